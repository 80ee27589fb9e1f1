"""The training stepper: training one phase at a time, recorded or live. Part of the studio; alone: `python apps/stepper.py`."""
import gradio as gr

from rlworkbench.core.config import Config
from rlworkbench.core.registry import policies, recipes, tasks
from rlworkbench.serving.board import COLUMNS
from rlworkbench.serving.clicks import CLICKS, heard
from rlworkbench.serving.deeds import arrived, asking, attempted, long_run, long_start, newest, watched, who_else
from rlworkbench.serving.frame import bar, served
from rlworkbench.serving.keys import ADDRESS, HELP, KEYS, STYLE
from rlworkbench.serving.places import Places
from rlworkbench.serving.sessions import Sessions
from rlworkbench.serving.stepping import LIVE, Desk, Shown, Spot, block, moved, shown
from rlworkbench.serving.workers import stop, working

QUICK = dict(queue=False, show_progress="hidden", trigger_mode="always_last")
MODEL = dict(concurrency_id="train", concurrency_limit=1, show_progress="minimal", trigger_mode="once")
PLAIN = dict(padding=False, apply_default_css=False)
DIAL = ("recipe", "task", "policy", "seed", "lr", "prompts", "group", "batches", "epochs")


def config_of(values, steps: int=1000) -> Config:
    "The dial's settings as a config. Raises ValueError."
    given = {k: v if k in ("recipe", "task", "policy", "lr") else int(v or 0) for k, v in zip(DIAL, values) if v not in (None, "", 0) or k == "seed"}
    return Config(**given, steps=steps, evaluate=0, threads="1", record="full", checkpoint=max(10, steps // 20), keep=0)


def build(places: Places, limit: int=4, alone: bool=False) -> gr.Blocks:
    "The page: boxes, buttons and wires. What they do is in serving/deeds and serving/stepping."
    desk, top = Desk(places, Sessions(limit, 900)), lambda **view: bar("stepper", alone, **view)

    def views(s: Shown, visitor) -> list:
        low, high = (s.steps[0], s.steps[-1]) if s.steps else (0, 0)
        slider = gr.update(minimum=low, maximum=max(high, low + 1), value=max(s.spot.step, low), interactive=len(s.steps) > 1, label=f"step {max(s.spot.step, 0)} of {high}")
        return [s.spot, top(run=None if s.live else s.spot.run or None), s.note, s.bar, s.board, s.card, s.curves, slider, s.spot.query,
                *(gr.update(visible=v) for v in (not s.live, s.live, s.live, s.live)), gr.update(choices=desk.names(visitor, s.spot.run), value=s.spot.run)]

    def at(spot, request, **how) -> list:
        return views(shown(desk, spot, request.session_hash, **how), request.session_hash)

    def arrive(request: gr.Request):
        s = arrived(desk, request.query_params, request.session_hash)
        said, alive = long_run(places, s.spot.run)
        return [*views(s, request.session_hash), s.spot.column, said, gr.Timer(active=alive), gr.update(visible=alive)]

    def look(run: str, request: gr.Request):
        said, alive = long_run(places, run)
        return [*at(Spot(run=run), request, follow=run == LIVE), said, gr.Timer(active=alive), gr.update(visible=alive)]

    def scrub(spot: Spot, step: int, request: gr.Request):
        return at(spot.but(step=int(step)), request)

    def walk(**by):
        def walked(spot: Spot, request: gr.Request):
            try:
                return at(moved(spot, desk.source(spot.run, request.session_hash), **by), request)
            except ValueError as e:
                return at(spot, request, says=str(e))
        return walked

    def coloured(spot: Spot, column: str, request: gr.Request):
        return at(spot.but(column=column), request)

    def picked(spot: Spot, group: int, request: gr.Request, event: gr.EventData):
        return at(spot.but(group=heard(event, pick=group)[0], reply=-1, token=-1), request)

    def chosen(spot: Spot, reply: int, token: int, request: gr.Request, event: gr.EventData):
        reply, token = heard(event, strip=reply, token=token)
        s = shown(desk, spot.but(reply=reply, token=token), request.session_hash)
        return s.spot, s.card, s.spot.query

    def deed(act):
        def done(request: gr.Request, spot: Spot, *given):
            me = request.session_hash
            return views(attempted(desk, spot, me, lambda: act(me, *given)), me)
        return done

    def work(act):
        def working(request: gr.Request, spot: Spot, *given):
            for s in watched(desk, spot, request.session_hash, lambda live: act(live, *(int(n or 0) for n in given))):
                yield views(s, request.session_hash)
        return working

    def pause(request: gr.Request):
        if trainer := desk.trainers.get(request.session_hash):
            trainer.pause()

    def stepper_left(request: gr.Request):
        desk.leave(request.session_hash)

    def leave_it(request: gr.Request):
        stepper_left(request)
        return at(Spot(run=places.default()), request)

    def who(spot: Spot, request: gr.Request):
        names = who_else(desk, spot, request.session_hash)
        return gr.update(choices=names, value=[n for n in ("dapo", "stapo") if n in names])

    def ask(spot: Spot, names: list, request: gr.Request, progress=gr.Progress()):
        yield from asking(desk, spot, request.session_hash, names, lambda n: progress((n, spot.step - 1), desc="steps made again"))

    def long_begin(request: gr.Request, spot: Spot, name: str, steps: float, *values):
        try:
            run = long_start(places, name, config_of(values, int(steps or 1)))
            return [*at(Spot(run=run), request), long_run(places, run)[0], gr.Timer(active=True), gr.update(visible=True)]
        except ValueError as e:
            return [*at(spot, request), block("error", str(e)), gr.Timer(active=False), gr.update(visible=False)]

    def long_stop(spot: Spot):
        folder = places.folder(spot.run) if spot.run in places.names() else places.runs / spot.run
        if here := working(folder):
            stop(folder)
        return long_run(places, spot.run)[0] + block("note", "" if here else "It was not started here; end it where it was started.")

    def tick(spot: Spot, last: int, request: gr.Request):
        (said, alive), now = long_run(places, spot.run), newest(desk, spot)
        follows = now not in (-1, spot.step) and spot.step in (-1, last)      # who has gone back to look is left alone
        fresh = at(spot.but(step=-1, phase=""), request) if follows else [gr.skip()] * len(screen)
        return [*fresh, said, gr.Timer(active=alive), gr.update(visible=alive), now]

    with gr.Blocks(title="Training stepper", analytics_enabled=False, delete_cache=(3600, 3600)) as demo:
        gr.Navbar(visible=False)
        first = shown(desk, Spot(run=next(iter(places.names()), "")), None)
        gr.HTML(f"<style>{STYLE}</style>", js_on_load=KEYS, elem_classes="rlw-hidden", **PLAIN)
        spot, query = gr.State(first.spot), gr.HTML("", js_on_load=ADDRESS, elem_id="address", elem_classes="rlw-hidden", **PLAIN)
        links, said = gr.HTML(top(), **PLAIN), [gr.Number(-1, visible=False, precision=0, label=what) for what in ("group", "reply", "token")]
        gr.HTML('<div class="rlw rlw-page rlw-title"><h1>Training stepper</h1><p class="rlw-soft">One training step, phase by phase: the replies, what they were worth, and what the update did to each token.</p></div>', **PLAIN)
        with gr.Row(elem_classes="rlw-controls"):
            run = gr.Dropdown(desk.names(None), value=first.spot.run, label="look at", scale=3, min_width=200, elem_id="run")
            step_before = gr.Button("◀ step", elem_id="step-before", scale=1, min_width=80)
            slider = gr.Slider(0, 1, step=1, label="step", scale=4, min_width=180, elem_id="step", buttons=[])
            step_after = gr.Button("step ▶", elem_id="step-after", scale=1, min_width=80)
            phase_seen = gr.Button("next phase ▸", elem_id="phase-next", scale=1, min_width=140)
        with gr.Row(elem_classes="rlw-controls"):
            recipe = gr.Dropdown([*recipes.all()], value="grpo", label="recipe", scale=2, min_width=160, elem_id="recipe")
            start = gr.Button("Train live", variant="primary", scale=1, min_width=110, elem_id="start")
            with gr.Column(scale=2, min_width=300), gr.Accordion("Settings of the trainer: task, policy, sizes, seed", open=False, elem_id="settings", elem_classes="rlw-fold"):
                with gr.Row(elem_classes="rlw-controls"):
                    task = gr.Dropdown([t for t in tasks.all() if not t.endswith(":")], value="digits-sum", label="task")
                    policy = gr.Dropdown([p for p in policies.all() if not p.endswith(":")], value="tiny", label="policy")
                    seed, lr = gr.Number(0, label="seed", precision=0, minimum=0), gr.Number(1e-4, label="learning rate")
                    prompts, group = gr.Number(4, label="P problems", precision=0, minimum=1), gr.Number(6, label="G replies", precision=0, minimum=1)
                    batches, epochs = gr.Number(0, label="minibatches (0: the recipe's)", precision=0, minimum=0), gr.Number(0, label="passes (0: the recipe's)", precision=0, minimum=0)
        with gr.Row(visible=False, elem_id="trainer", elem_classes="rlw-controls") as controls:
            phase_live = gr.Button("next phase ▸", variant="primary", elem_id="phase-live", min_width=120)
            step_live, back_live, pause_live = (gr.Button(t, elem_id=i, min_width=90) for t, i in (("next step", "step-live"), ("◂ back", "back"), ("pause", "pause")))
            count, several = gr.Number(5, label="steps", precision=0, minimum=1, maximum=50, min_width=80, elem_id="count"), gr.Button("run them", elem_id="run-steps", min_width=90)
            target, onward = gr.Number(0, label="step", precision=0, minimum=0, min_width=80, elem_id="target"), gr.Button("go to it", elem_id="go", min_width=90)
            other, forked = gr.Dropdown([*recipes.all()], value="dapo", label="another recipe", min_width=140, elem_id="other"), gr.Button("fork here", elem_id="fork", min_width=90)
            reset, leave = gr.Button("reset", elem_id="reset", min_width=80), gr.Button("close trainer", elem_id="close", min_width=80)
        with gr.Row(elem_classes="rlw-controls"):
            state, halt = gr.HTML("", **PLAIN, elem_id="state"), gr.Button("Stop", visible=False, variant="stop", elem_id="halt", min_width=90)
        note, phases = gr.HTML(first.note, **PLAIN, elem_id="note"), gr.HTML(first.bar, **PLAIN, elem_id="phases")
        with gr.Row(elem_id="main"):
            with gr.Column(scale=5, min_width=320):
                column = gr.Dropdown([(c.label, n) for n, c in COLUMNS.items()], value="share", label="colour tokens by", elem_id="column", elem_classes="rlw-menu")
                board = gr.HTML(first.board, js_on_load=CLICKS, **PLAIN, elem_id="board")
            with gr.Column(scale=4, min_width=300):
                card, curves = gr.HTML(first.card, **PLAIN, elem_id="card"), gr.HTML(first.curves, **PLAIN, elem_id="curves")
        with gr.Accordion("What would another recipe have done with these replies?", open=False, elem_id="whatif", elem_classes="rlw-fold") as whatif:
            with gr.Row(elem_classes="rlw-controls"):
                names, question = gr.Dropdown([], multiselect=True, label="recipes", scale=5, elem_id="names"), gr.Button("Ask", scale=1, min_width=90, elem_id="ask")
            making, answer = gr.HTML("", **PLAIN, elem_id="making"), gr.HTML("", **PLAIN, elem_id="answer")
        with gr.Accordion("A long run, in a process of its own, with the settings above", open=False, elem_id="long", elem_classes="rlw-fold"):
            with gr.Row(elem_classes="rlw-controls"):
                name, steps = gr.Textbox(label="name", placeholder="made of recipe, task and seed", scale=3, elem_id="name"), gr.Number(100, label="steps", precision=0, minimum=1, scale=1, min_width=90, elem_id="steps")
                launch = gr.Button("Start", elem_id="launch", min_width=90)
        timer, last = gr.Timer(1.0, active=False), gr.State(-1)
        gr.HTML(HELP, **PLAIN)

        screen = [spot, links, note, phases, board, card, curves, slider, query, phase_seen, phase_live, controls, leave, run]
        dial, worker = [recipe, task, policy, seed, lr, prompts, group, batches, epochs], [state, timer, halt]
        demo.load(arrive, None, [*screen, column, *worker], queue=False, show_progress="hidden", api_name="stepper_arrive")
        run.input(look, run, [*screen, *worker], api_name="look", **QUICK)
        slider.input(scrub, [spot, slider], screen, api_name="scrub", **QUICK)
        for button, by, called in ((step_before, {"steps": -1}, "before"), (step_after, {"steps": 1}, "after"), (phase_seen, {"phases": 1}, "next_seen")):
            button.click(walk(**by), spot, screen, api_name=called, queue=False, show_progress="hidden", trigger_mode="multiple")
        column.input(coloured, [spot, column], screen, api_name="colour", **QUICK)
        board.select(picked, [spot, said[0]], screen, api_name="pick", **QUICK)
        board.click(chosen, [spot, *said[1:]], [spot, card, query], api_name="stepper_token", **QUICK)
        deeds = ((start, deed(lambda me, *v: desk.begin(me, config_of(v))), dial, "begin"), (phase_live, deed(lambda me: desk.live(me).next()), [], "next_phase"),
                 (step_live, work(lambda live: live.run(1)), [], "next_step"), (back_live, work(lambda live: live.retreat()), [], "back"),
                 (several, work(lambda live, n: live.run(max(1, min(n, 50)))), [count], "run_steps"), (onward, work(lambda live, n: live.go(max(0, min(n, live.done + 50)))), [target], "go"),
                 (forked, deed(lambda me, r: desk.live(me).fork(r)), [other], "fork"), (reset, deed(lambda me: desk.live(me).reset()), [], "reset"))
        for button, done, given, called in deeds:
            each = {"trigger_mode": "multiple"} if called in ("next_phase", "next_step", "back") else {}     # a key that is pressed thrice means three
            button.click(done, [spot, *given], screen, api_name=called, **(MODEL | each))
        pause_live.click(pause, None, None, queue=False, api_name="pause")
        leave.click(leave_it, None, screen, queue=False, api_name="close")
        whatif.expand(who, spot, names, queue=False, show_progress="hidden", api_name="who")
        question.click(ask, [spot, names], answer, api_name="whatif", show_progress_on=making, **(MODEL | {"show_progress": "full"}))
        launch.click(long_begin, [spot, name, steps, *dial], [*screen, *worker], queue=False, api_name="long_begin")
        halt.click(long_stop, spot, state, queue=False, api_name="long_stop")
        timer.tick(tick, [spot, last], [*screen, *worker, last], queue=False, show_progress="hidden", api_name="tick")
        demo.unload(stepper_left)
    return demo


if __name__ == "__main__":
    served(build(Places(), alone=True))
