"""Many clients on a studio that runs. `python -m tests.benchmarks.studio [--clients 20] [--seconds 60]`"""
import argparse
import json
import statistics
import threading
import time

from gradio_client import Client

def visit(client: Client, me: int, until: float, out: list):
    "One client that goes through recorded pages and sees whether each answer is what it asked for."
    runs = ("recorded", "second", "bandit/0", "bandit/1", "bandit/2", "bandit/rloo")
    k = me
    while time.monotonic() < until:
        name, k, began = runs[k % len(runs)], k + 1, time.perf_counter()
        try:
            if k % 2:
                page, own = client.predict(name, api_name="/hub_of"), "<h1>The recorded run</h1>" if name == "recorded" else f"<h1>{name}</h1>"
            else:
                page, own = client.predict([name], "entropy", api_name="/compare_measure"), f"<td><bdi>{name}</bdi>"
            out.append((time.perf_counter() - began, "" if own in page else "crossed"))
        except Exception as e:
            out.append((time.perf_counter() - began, f"{type(e).__name__}: {e}"))


def crowd(
    url: str,
    clients: int = 20,
    seconds: float = 60,
) -> dict:
    "Answers, errors, answers that were another's, and how long answers took, in seconds."
    visitors = [Client(url, verbose=False, httpx_kwargs={"timeout": 60}) for _ in range(clients)]
    out, until = [], time.monotonic() + seconds
    threads = [threading.Thread(target=visit, args=(v, k, until, out)) for k, v in enumerate(visitors)]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    times, wrong = sorted(t for t, _ in out), [w for _, w in out if w]
    return {"clients": clients, "seconds": seconds, "answers": len(out), "errors": [w for w in wrong if w != "crossed"], "crossed": wrong.count("crossed"),
            "median": round(statistics.median(times), 3), "p95": round(times[int(.95 * (len(times) - 1))], 3), "most": round(times[-1], 3)}


def main():
    from tests.studio import running
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--clients", type=int, default=20)
    parser.add_argument("--seconds", type=float, default=60)
    args = parser.parse_args()
    print(json.dumps(crowd(running().url, args.clients, args.seconds), indent=1))


if __name__ == "__main__":
    main()
