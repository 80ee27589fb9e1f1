"""Many clients on the recorded pages of a studio that runs. `python -m tests.benchmarks.studio [--clients 20] [--seconds 60]`"""
import argparse
import json
import re
import statistics
import threading
import time
from functools import cache

from gradio_client import Client

from rlworkbench.serving.places import shipped
from rlworkbench.show.palette import number
from rlworkbench.training.run import Run

RUNS = ("recorded", "second", "bandit/0", "bandit/1", "bandit/2", "bandit/rloo")


@cache
def recorded(step: int):
    "The tokens of a step of the recorded run."
    return Run.open(shipped()).tokens(step)


class Visitor:
    "A client that goes through the pages on a path of its own, and knows what each answer must say."

    def __init__(self, client: Client, me: int):
        self.client, self.k = client, me
        client.predict(api_name="/stepper_arrive"), client.predict("recorded", api_name="/run")

    def first_page(self) -> tuple:   # what was answered, what has to be in it
        name = RUNS[self.k % len(RUNS)]
        return self.client.predict(name, api_name="/hub_of"), ["<h1>The recorded run</h1>" if name == "recorded" else f"<h1>{name}</h1>"]

    def comparison(self) -> tuple:
        name = RUNS[self.k % len(RUNS)]
        return self.client.predict([name], "entropy", api_name="/compare_measure"), [f"<td><bdi>{name}</bdi>"]

    def stepper_step(self) -> tuple:
        said = self.client.predict(step := self.k % 10 + 1, api_name="/scrub")
        query = next(x for x in said if isinstance(x, str) and x.startswith("run="))
        self.step, self.group = step, int(re.search(r"group=(\d+)", query)[1])
        return str(said), [f"step={step}&", "Recorded run: grpo on digits-sum"]

    def stepper_token(self) -> tuple:
        rows = recorded(self.step)
        row = (part := rows[rows["group"] == self.group]).iloc[self.k % len(part)]
        reply, token = int(row["reply"]), int(row["position"])
        card, query = self.client.predict(reply, token, api_name="/stepper_token")
        return card + query, [f"step={self.step}&", f"reply={reply}&token={token}", f"token {token + 1} of", number(row["old"] + 0.0, digits=4), number(row["entropy"] + 0.0, digits=4)]

    def inspector_step(self) -> tuple:
        self.page = self.k * 3 % 10 + 1
        return str(self.client.predict(self.page, api_name="/step")), [f"recorded, step {self.page}, reply 0<"]

    def inspector_reply(self) -> tuple:
        self.reply = self.k * 7 % 64
        return str(self.client.predict(self.reply, api_name="/reply")), [f"recorded, step {self.page}, reply {self.reply}<", f"step={self.page}&reply={self.reply}"]

    def inspector_token(self) -> tuple:
        rows = recorded(self.page)
        row = (part := rows[rows["reply"] == self.reply]).iloc[self.k % len(part)]
        return str(self.client.predict(0, int(row["position"]), api_name="/inspector_token")), [f"step={self.page}&reply={self.reply}&token={row['position']}", f"token {row['position'] + 1} of", number(row["entropy"] + 0.0)]

    def round(self):
        "One of each, in turn, and on."
        self.k += 1
        return self.first_page, self.comparison, self.stepper_step, self.stepper_token, self.inspector_step, self.inspector_reply, self.inspector_token


def visit(visitor: Visitor, until: float, out: list):
    "One client, until the time is over: endpoint, seconds, what went wrong."
    while time.monotonic() < until:
        for ask in visitor.round():
            began = time.perf_counter()
            try:
                said, own = ask()
                out.append((ask.__name__, time.perf_counter() - began, "" if all(o in said for o in own) else "crossed"))
            except Exception as e:
                out.append((ask.__name__, time.perf_counter() - began, f"{type(e).__name__}: {e}"))


def quantiles(times: list) -> dict:
    "Seconds in the middle, and for all but one in twenty."
    return {"median": round(statistics.median(times), 3), "p95": round(sorted(times)[int(.95 * (len(times) - 1))], 3)}


def crowd(
    url: str,
    clients: int = 20,
    seconds: float = 60,
) -> dict:
    "Answers, errors, answers that were another's, how long answers took, in seconds, and the work of server and clients, if they are one process."
    visitors = [Visitor(Client(url, verbose=False, httpx_kwargs={"timeout": 60}), k) for k in range(clients)]
    out, until, worked = [], time.monotonic() + seconds, time.process_time()
    threads = [threading.Thread(target=visit, args=(v, until, out)) for v in visitors]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    wrong, asked = [w for _, _, w in out if w], {name: [t for n, t, _ in out if n == name] for name, _, _ in out}
    return {"clients": clients, "seconds": seconds, "answers": len(out), "errors": [w for w in wrong if w != "crossed"], "crossed": wrong.count("crossed"),
            **quantiles([t for _, t, _ in out]), "cpu_ms_an_answer": round(1000 * (time.process_time() - worked) / max(1, len(out))), "most": round(max(t for _, t, _ in out), 3), "by_endpoint": {name: {"answers": len(t)} | quantiles(t) for name, t in asked.items()}}


def main():
    from tests.studio import running
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--clients", type=int, default=20)
    parser.add_argument("--seconds", type=float, default=60)
    args = parser.parse_args()
    print(json.dumps(crowd(running().url, args.clients, args.seconds), indent=1))


if __name__ == "__main__":
    main()
