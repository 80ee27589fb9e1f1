"""The latent lab: a recorded latent run to scrub through, a thought to move by hand, the probes of the space. `rlworkbench studio`, or `python apps/lab.py`."""
from dataclasses import asdict

import gradio as gr

from rlworkbench.serving.clicks import heard
from rlworkbench.serving.filmed import LATENT
from rlworkbench.serving.frame import bar, served, told
from rlworkbench.serving.keys import ADDRESS, KEYS
from rlworkbench.serving.lab import SCRIPT, Lab, LabView, Screen, lab_view, live, screen, waits
from rlworkbench.serving.places import Places
from rlworkbench.serving.space import MOVING
from rlworkbench.serving.thinker import REACH, SOURCES, STEP

QUICK = dict(queue=False, show_progress="hidden", trigger_mode="always_last")
MODEL = dict(concurrency_id="model", concurrency_limit=1, show_progress="hidden", trigger_mode="always_last")
PLAIN = dict(padding=False)
WAITING = told("empty", "The policy is being loaded …")
DIALS = ("problem", "source", "heat", "slot", "axis", "at")


def build(places: Places, limit: int=4, alone: bool=False) -> gr.Blocks:
    "The page: boxes and wires. What it shows is made in serving/lab."
    lab = Lab(places, limit)

    def views(s: Screen) -> list:
        last, v = max(len(s.steps) - 1, 1), s.view
        when = f"after {s.steps[s.at]} training steps, look {s.at + 1} of {len(s.steps)}" if s.steps else "no look yet"
        return [asdict(v), v.query or " ", bar("lab", alone, run=None if v.run == LATENT else v.run), s.says, s.note, s.clouds, s.trends, s.panel, s.problem,
                gr.update(maximum=last, value=s.at, label=when, interactive=len(s.steps) > 1), gr.update(interactive=s.at > 0), gr.update(interactive=s.at < len(s.steps) - 1),
                gr.update(maximum=max(s.problems - 1, 1), value=v.problem)]

    def dials(s: Screen) -> list:
        v, named = s.view, [*dict.fromkeys([*lab.names(), s.view.run])]
        return [gr.update(choices=named, value=v.run), v.source, v.heat, gr.update(choices=[(str(k), k) for k in range(s.slots)], value=v.slot),
                gr.update(choices=[(str(k + 1), k) for k in range(min(s.width, 5))], value=v.axis), v.at]

    def arrive(request: gr.Request):
        s = screen(lab, lab_view(request.query_params if request else {}))
        return [*views(s), *dials(s)]

    def look(run: str):
        s = screen(lab, LabView(run=str(run)))
        return [*views(s), *dials(s)]

    def film(held: dict, progress=gr.Progress()):
        view = lab_view(held)
        if not waits(lab, view):
            return [gr.skip()] * len(everything)
        s = screen(lab, view, lambda k, of: progress((k, of), desc="checkpoints"))
        return [*views(s), *dials(s)]

    def moment(held: dict, by: int, at=None):
        view = lab_view(held)
        steps = (now := screen(lab, view)).steps
        if not steps:
            return views(now)
        return views(screen(lab, view.but(step=steps[min(max(now.at + by if at is None else int(at), 0), len(steps) - 1)])))

    def scrub(held: dict, at: float):
        return moment(held, 0, at)

    def before(held: dict):
        return moment(held, -1)

    def after(held: dict):
        return moment(held, 1)

    def choose(held: dict, number: int, event: gr.EventData):
        return views(screen(lab, lab_view({**held, "problem": heard(event, token=number)[0]})))

    def other(held: dict, problem: float):
        return views(screen(lab, lab_view({**held, "problem": problem})))

    def ask(held: dict, request: gr.Request) -> list:
        view = lab_view(held)
        if waits(lab, view):
            return ["", "", "", ""]
        found = live(lab, view, request.session_hash)
        return [found.answer, found.walk, found.slots, found.wrong]

    def turn(name: str):
        def turned(held: dict, value, request: gr.Request):
            view = lab_view({**held, name: value})
            return [asdict(view), view.query or " ", *ask(asdict(view), request)]
        return turned

    def again(held: dict, request: gr.Request):
        view = lab_view(held)
        view = view.but(heat=view.heat or 1.0, draw=(view.draw + 1) % 1000)
        return [asdict(view), view.query or " ", *ask(asdict(view), request), view.heat]

    def back(held: dict, request: gr.Request):
        view = lab_view(held).but(source=SOURCES[0], heat=0.0, draw=0, at=0.0)
        return [asdict(view), view.query or " ", *ask(asdict(view), request), view.source, view.heat, view.at]

    def release(request: gr.Request):
        lab.thinkers.close(request.session_hash)

    first = screen(lab, LabView())
    with gr.Blocks(title="Latent lab", analytics_enabled=False, delete_cache=(3600, 3600)) as demo:
        gr.Navbar(visible=False)
        held, picked = gr.State(asdict(LabView())), gr.Number(visible=False, precision=0)
        links, query = gr.HTML(bar("lab", alone), **PLAIN), gr.HTML("", html_template="", js_on_load=ADDRESS, **PLAIN, elem_id="query", elem_classes="rlw-hidden")
        gr.HTML("", html_template="", js_on_load=KEYS, **PLAIN, elem_classes="rlw-hidden")
        says, note = gr.HTML(first.says, **PLAIN, elem_id="says"), gr.HTML(first.note, **PLAIN, elem_id="note")
        with gr.Row(elem_classes="rlw-dials"):
            run = gr.Dropdown([LATENT], value=LATENT, label="run", elem_id="run", allow_custom_value=True, scale=3, min_width=200)
            step = gr.Slider(0, max(len(first.steps) - 1, 1), first.at, step=1, label="look", elem_id="moment", scale=6, min_width=260)
            earlier, later = gr.Button("◀", elem_id="step-before", scale=0, min_width=44), gr.Button("▶", elem_id="step-after", scale=0, min_width=44)
        with gr.Row(elem_classes="rlw-stack", elem_id="film"):
            clouds = gr.HTML(first.clouds, js_on_load=SCRIPT, **PLAIN, elem_id="clouds")
            curves = gr.HTML(first.trends, **PLAIN, elem_id="trends")
        gr.HTML('<div class="rlw"><h2>Move a thought, and see what it answers</h2><p class="rlw-soft">The policy as it was at the end of this run, on the problem that is chosen above. '
                'It has seen this picture in no training step.</p></div>', **PLAIN)
        wrong = gr.HTML("", **PLAIN, elem_id="wrong")
        with gr.Row(elem_classes="rlw-stack", elem_id="think"):
            with gr.Column(scale=3, min_width=210):
                asked = gr.HTML(first.problem, **PLAIN, elem_id="problem-card")
                problem = gr.Slider(0, max(first.problems - 1, 1), first.view.problem, step=1, label="problem", elem_id="problem")
            with gr.Column(scale=5, min_width=280):
                source = gr.Radio([("its prior", SOURCES[0]), ("its posterior, which has seen the answer", SOURCES[1]), ("another problem’s prior", SOURCES[2])], value=SOURCES[0], label="the thought comes from", elem_id="source")
                heat = gr.Slider(0, 4, 0, step=.1, label="temperature", info="0 is the mean, 1 a fair draw", elem_id="heat")
                with gr.Row(elem_classes="rlw-axis"):
                    slot = gr.Radio([(str(k), k) for k in range(first.slots)], value=0, label="walk slot", elem_id="slot", min_width=120)
                    axis = gr.Radio([(str(k + 1), k) for k in range(min(first.width, 5))], value=0, label="along direction", elem_id="axis", min_width=140)
                at = gr.Slider(-REACH, REACH, 0, step=STEP, label="how far", info="in standard deviations of the prior’s samples", elem_id="at")
                with gr.Row():
                    redraw, home = gr.Button("Draw again", size="sm", elem_id="redraw", min_width=90), gr.Button("Back to the prior’s mean", size="sm", elem_id="home", min_width=150)
            with gr.Column(scale=5, min_width=280):
                answer = gr.HTML(WAITING, js_on_load=MOVING, **PLAIN, elem_id="answer")
        with gr.Row(elem_classes="rlw-stack", elem_id="walked"):
            walk, slots = gr.HTML("", **PLAIN, elem_id="walk"), gr.HTML("", **PLAIN, elem_id="slots")
        gr.HTML('<div class="rlw"><h2>Is the latent space stable?</h2><p class="rlw-soft">What the probes found at the look that is chosen above: one question, one figure, what to notice.</p></div>', **PLAIN)
        panel = gr.HTML(first.panel, **PLAIN, elem_id="panel")

        screened = [held, query, links, says, note, clouds, curves, panel, asked, step, earlier, later, problem]
        everything, thought = [*screened, run, source, heat, slot, axis, at], [answer, walk, slots, wrong]

        def then_ask(event, name: str):
            return event.then(ask, held, thought, api_name=f"{name}_asked", **MODEL)

        def then_film(event, name: str):
            return then_ask(event.then(film, held, everything, api_name=f"{name}_film", **MODEL | {"show_progress": "minimal"}), name)
        then_film(demo.load(arrive, None, everything, api_name="lab", queue=False, show_progress="hidden"), "lab")
        then_film(run.input(look, run, everything, api_name="lab_run", **QUICK), "lab_run")
        step.input(scrub, [held, step], screened, api_name="lab_scrub", **QUICK)
        earlier.click(before, held, screened, api_name="lab_before", **QUICK)
        later.click(after, held, screened, api_name="lab_after", **QUICK)
        then_ask(clouds.click(choose, [held, picked], screened, api_name="lab_choose", **QUICK), "lab_choose")
        then_ask(problem.input(other, [held, problem], screened, api_name="lab_problem", **QUICK), "lab_problem")
        for box in (source, heat, slot, axis, at):
            box.input(turn(box.elem_id), [held, box], [held, query, *thought], api_name=f"lab_{box.elem_id}", **MODEL)
        redraw.click(again, held, [held, query, *thought, heat], api_name="lab_redraw", **MODEL)
        home.click(back, held, [held, query, *thought, source, heat, at], api_name="lab_home", **MODEL)
        demo.unload(release)
    return demo


if __name__ == "__main__":
    served(build(Places(), alone=True))
