"""Reasoning at test time: one question, several strategies side by side, and all that they paid for. `rlworkbench studio`, or `python apps/reasoning.py`."""
from dataclasses import asdict

import gradio as gr

from rlworkbench.core.registry import strategies, tasks
from rlworkbench.serving.answers import COLOURS, DEAREST, TOGETHER, Asking, read_asking
from rlworkbench.serving.frame import bar, served
from rlworkbench.serving.keys import ADDRESS
from rlworkbench.serving.panels import page_css
from rlworkbench.serving.places import Places
from rlworkbench.serving.thinking import Thinking, live, policies_there, untimed
from rlworkbench.serving.tries import cards_html, screen

QUICK = dict(queue=False, show_progress="hidden", trigger_mode="always_last")
MODEL = dict(concurrency_id="model", concurrency_limit=1, show_progress="hidden")
PLAIN = dict(padding=False)
TITLE = ('<div class="rlw"><h1>Reasoning</h1><p class="rlw-soft">One question, asked in several ways with as many tokens for each. A card shows the answer, what was paid for it, and everything '
         'that was tried. Ticks are the task’s verdict; only a strategy marked as oracle saw it.</p></div>')


def ways() -> list:
    "Strategies as lines of a menu."
    return [(name + " (oracle)" * s.oracle, name) for name, s in sorted(strategies.all().items())]


def build(places: Places, alone: bool=False) -> gr.Blocks:
    "The page: boxes and wires. What it shows is made in serving/thinking and serving/tries."
    desk = Thinking(places)

    def views(view: Asking, thinking: str="", wrong: str="") -> list:
        view, *shown = screen(desk, view, thinking, wrong)
        buttons = [gr.update(interactive=not thinking and bool(untimed(desk, view))), gr.update(interactive=bool(thinking))]
        return [asdict(view), view.query or " ", bar("reasoning", alone), *shown, *buttons]

    def dials(view: Asking) -> list:
        view, there = screen(desk, view)[0], policies_there(places)
        return [view.task, view.problem, gr.update(choices=list(dict.fromkeys([*there, view.asked])), value=view.asked), view.seed, view.budget, view.names, view.colour]

    def arrive(request: gr.Request):
        view = read_asking(request.query_params if request else {})
        return [*views(view), *dials(view)]

    def asked(held: dict, again: bool=True):
        view = read_asking(held)
        for thinking, wrong, so_far in live(desk, view, again):
            yield [cards_html(desk, view, thinking, so_far) if box is sides else gr.skip() for box in outputs] if so_far else views(view, thinking, wrong)

    def arrived_asked(held: dict):
        view = read_asking(held)
        if all(desk.answer(view, n) for n in view.names):
            yield [gr.skip()] * len(outputs)      # it is all on screen, and somebody may be choosing already
            return
        for now in asked(held, False):
            yield [gr.skip() if box is says and not now[k] else now[k] for k, box in enumerate(outputs)]

    def turn(name: str):
        def turned(held: dict, value):
            text = ",".join(value) if isinstance(value, list) else "" if value is None else value
            return views(read_asking({**held, name: text}))
        return turned

    def other(held: dict, task: str):
        view = read_asking({**held, "task": task, "problem": 0, "policy": ""})
        return [*views(view), *dials(view)]

    def stop(held: dict):
        return views(read_asking(held))

    with gr.Blocks(title="Reasoning", analytics_enabled=False, delete_cache=(3600, 3600)) as demo:
        gr.Navbar(visible=False)
        gr.HTML(f"<style>{page_css()}</style>", elem_classes="rlw-hidden", **PLAIN)
        first, *shown = screen(desk, Asking())
        held = gr.State(asdict(first))
        links, query = gr.HTML(bar("reasoning", alone), **PLAIN), gr.HTML("", html_template="", js_on_load=ADDRESS, **PLAIN, elem_id="query", elem_classes="rlw-hidden")
        gr.HTML(TITLE, **PLAIN)
        says = gr.HTML(shown[0], **PLAIN, elem_id="says")
        with gr.Row(elem_classes="rlw-stack", elem_id="asking"):
            with gr.Column(scale=3, min_width=230):
                question = gr.HTML(shown[1], **PLAIN, elem_id="question")
            with gr.Column(scale=9, min_width=280):
                with gr.Row(elem_classes="rlw-numbers-row"):
                    task = gr.Dropdown(sorted(n for n in tasks.all() if not n.endswith(":")), value=first.task, label="task", elem_id="task", scale=3, min_width=170)
                    problem = gr.Number(first.problem, precision=0, minimum=0, step=1, label="problem", elem_id="problem", scale=1, min_width=90)
                    policy = gr.Dropdown(["tiny"], value="tiny", label="policy", elem_id="policy", scale=3, min_width=150, allow_custom_value=True)
                chosen = gr.Dropdown(ways(), value=first.names, multiselect=True, max_choices=TOGETHER, label=f"strategies, up to {TOGETHER}", elem_id="strategies")
                with gr.Row(elem_classes="rlw-numbers-row"):
                    budget = gr.Slider(0, DEAREST, first.budget, step=1, label="tokens for each", elem_id="budget", scale=5, min_width=200)
                    seed = gr.Number(first.seed, precision=0, minimum=0, step=1, label="seed", elem_id="seed", scale=1, min_width=80)
                    colour = gr.Radio([*COLOURS], value=first.colour, label="shade tokens by", elem_id="colour", scale=6, min_width=330)
                with gr.Row(elem_classes="rlw-go"):
                    ask, cancel = gr.Button("Ask", variant="primary", elem_id="ask", scale=0, min_width=120, interactive=False), gr.Button("Stop", elem_id="stop", scale=0, min_width=90, interactive=False)
        legend = gr.HTML(shown[2], **PLAIN, elem_id="legend")
        sides, curve = gr.HTML(shown[3], **PLAIN, elem_id="sides"), gr.HTML(shown[4], **PLAIN, elem_id="curve")

        outputs = [held, query, links, says, question, legend, sides, curve, ask, cancel]
        boxes = dict(problem=problem, policy=policy, seed=seed, budget=budget, strategies=chosen, colour=colour)
        everything = [*outputs, task, problem, policy, seed, budget, chosen, colour]
        arrived = demo.load(arrive, None, everything, api_name="reasoning", queue=False, show_progress="hidden")
        going = [arrived.then(arrived_asked, held, outputs, api_name="reasoning_arrived_asked", **MODEL), ask.click(asked, held, outputs, api_name="reasoning_asked", **MODEL)]
        task.input(other, [held, task], everything, api_name="reasoning_task", cancels=going, **QUICK)
        for name, box in boxes.items():
            (box.release if name == "budget" else box.input)(turn(name), [held, box], outputs, api_name=f"reasoning_{name}", cancels=going, **QUICK)
        cancel.click(stop, held, outputs, api_name="reasoning_stop", cancels=going, **QUICK)
    return demo


if __name__ == "__main__":
    served(build(Places(), alone=True))
