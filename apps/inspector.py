"""The trace inspector: one reply, recorded, from a file or just written, taken apart. `rlworkbench studio`, or `python apps/inspector.py`."""
from dataclasses import asdict

import gradio as gr
from rlworkbench.apps.pairs import fold

from rlworkbench.serving.clicks import CLICKS, heard
from rlworkbench.serving.frame import bar, served, told
from rlworkbench.serving.inspection import Inspection, asked, lenses, sentence, shown
from rlworkbench.serving.keys import ADDRESS
from rlworkbench.serving.moves import changed, clicked, files, forked, handed_in, ink_of_canvas, preview
from rlworkbench.serving.pairs import steps_of
from rlworkbench.serving.panels import page_css
from rlworkbench.serving.places import Places
from rlworkbench.serving.reasons import WAYS_TO_ASK
from rlworkbench.serving.strokes import CANVAS, CANVAS_CSS, CANVAS_HTML, QUESTIONS, drawing
from rlworkbench.serving.uploads import uploaded
from rlworkbench.serving.view import View, view_of

QUICK = dict(queue=False, show_progress="hidden", trigger_mode="always_last")
MODEL = dict(concurrency_id="model", concurrency_limit=1, show_progress="hidden", trigger_mode="always_last")
PLAIN = dict(padding=False)
STYLE = page_css() + CANVAS_CSS
WAITING = told("empty", "Asking the policy …")
SOURCES, PARTS = ["a recorded run", "a file", "a drawing"], ["token", "segment", "reply"]


def build(places: Places, alone: bool=False) -> gr.Blocks:
    "The page. What it shows is made in serving/inspection; here are boxes and wires."
    desk = Inspection(places)

    def screen(view: View) -> list:
        p, numbers, runs = shown(desk, view), steps_of(desk, view), places.names()
        source = SOURCES[1] if view.trace else SOURCES[2] if view.ask else SOURCES[0]
        return [asdict(view), view.query or " ", bar("inspector", alone, run=view.run or None), p.says, p.reply, p.checks, p.token, p.picture, gr.update(choices=[*p.columns], value=p.column or None),
                gr.update(choices=[*p.replies], value=view.reply if view.reply < len(p.replies) else None),
                gr.update(choices=[*p.policies], value=view.policy or next(iter(p.policies), None), visible=len(p.policies) > 1),
                gr.update(choices=runs, value=view.run or next(iter(runs), None)),
                gr.update(choices=numbers, value=view.step if view.step in numbers else next(iter(numbers), None)), source, *(gr.update(visible=source == s) for s in SOURCES), *fill(view)]

    def live(held):
        a = asked(desk, view_of(held))
        return [a.reply or gr.skip(), a.checks or gr.skip(), a.token or gr.skip(), a.top, gr.update(choices=[*a.choices], value=a.instead or None),
                a.ways, a.over, a.map, a.why, a.wrong, gr.update(interactive=bool(a.choices))]

    def menu(name):
        return lambda held, value: screen(changed(view_of(held), name, value))

    def token(held, of_strip: int, of_token: int, event: gr.EventData):
        view, card, checks = clicked(desk, view_of(held), *heard(event, strip=of_strip, token=of_token))
        return [asdict(view), view.query, card, checks]

    def explain(held, part, method):
        view = view_of(held).but(part=part, method=method)
        return asdict(view), view.query

    def patch(held, number: int, event: gr.EventData):
        view = view_of(held).but(patch=heard(event, token=number)[0])
        return asdict(view), view.query

    def attempt(make, kind="note"):
        "The screen of a view that may be refused; then nothing moves but a sentence."
        try:
            return [*screen(make()), ""]
        except (ValueError, OSError) as e:
            return [*(gr.skip() for _ in outputs), told(kind, sentence(str(e)))]

    def branch(held, number):
        return attempt(lambda: forked(desk, view_of(held), number))

    def prune(held):
        return screen(view_of(held).but(branches="", branch=0))

    def dropped(file):
        return attempt(lambda: handed_in(desk, file), "error")

    def seen_as(get):
        try:
            picture = get()
            return picture, preview(picture)
        except ValueError as e:
            return None, told("error", sentence(str(e)))

    def inked(event: gr.EventData):
        return seen_as(lambda: ink_of_canvas(event.picture))

    def brought(file):
        return seen_as(lambda: uploaded(file))

    def ask(ink, question, truth):
        return attempt(lambda: desk.answer(drawing(ink, question or "", truth or "")))

    def arrive(request: gr.Request):
        view = view_of(dict(request.query_params) if request else {})
        try:
            return [*screen(desk.answer(view)), view.ask or gr.skip(), view.part if view.part in PARTS else PARTS[0], view.method if view.method in WAYS_TO_ASK else WAYS_TO_ASK[0], ""]
        except ValueError as e:
            return [*screen(View()), gr.skip(), gr.skip(), gr.skip(), told("error", sentence(str(e)))]

    with gr.Blocks(title="Trace inspector", analytics_enabled=False, delete_cache=(3600, 3600)) as demo:
        gr.Navbar(visible=False)
        gr.HTML(f"<style>{STYLE}</style>", elem_classes="rlw-hidden", **PLAIN)
        held, ink, said = gr.State(asdict(View())), gr.State(None), [gr.Number(-1, visible=False, precision=0, label=what) for what in ("strip", "token", "patch")]
        links, query = gr.HTML(bar("inspector", alone), **PLAIN), gr.HTML("", html_template="", js_on_load=ADDRESS, **PLAIN, elem_id="query", elem_classes="rlw-hidden")
        first = shown(desk, View())
        with gr.Row(elem_classes="rlw-stack"):
            with gr.Column(scale=3, min_width=250, elem_id="sources"):
                source = gr.Radio(SOURCES, value=SOURCES[0], label="look at", elem_id="source")
                with gr.Group() as of_run:
                    run, step = gr.Dropdown(places.names(), label="run", elem_id="run", filterable=True), gr.Dropdown([], label="step", elem_id="step")
                with gr.Group(visible=False) as of_file:
                    file = gr.File(label="traces: ours, completions of TRL, prime-rl, messages, Agent Data Protocol", type="filepath", height=120, elem_id="file")
                    of_file_says = gr.HTML("", **PLAIN, elem_id="file-says")
                with gr.Group(visible=False) as of_ink:
                    canvas = gr.HTML(html_template=CANVAS_HTML, js_on_load=CANVAS, **PLAIN, elem_id="canvas")
                    with gr.Row():
                        wipe, bring = gr.Button("Wipe", size="sm", elem_id="wipe", min_width=60), gr.UploadButton("Bring a picture", file_types=["image"], size="sm", elem_id="bring", min_width=100)
                    seen = gr.HTML("", **PLAIN, elem_id="seen")
                    question = gr.Dropdown([*QUESTIONS], value="What is the sum?", allow_custom_value=True, label="question", elem_id="question")
                    truth = gr.Textbox(label="the digits you drew, so that the reply can be checked", max_lines=1, max_length=20, elem_id="truth")
                    go = gr.Button("Ask tiny", variant="primary", elem_id="ask")
                    trouble = gr.HTML("", **PLAIN, elem_id="trouble")
                with gr.Group():
                    reply, column = gr.Dropdown([], label="reply", elem_id="reply-menu"), gr.Dropdown([], label="colour tokens by", elem_id="column")
                    policy = gr.Dropdown([], label="policy that is asked", visible=False, elem_id="policy")
            with gr.Column(scale=8, min_width=320):
                says = gr.HTML(first.says, **PLAIN, elem_id="says")
                with gr.Row(elem_classes="rlw-stack"):
                    with gr.Column(scale=2, min_width=230):
                        picture = gr.HTML(first.picture, **PLAIN, elem_id="picture")
                        shades = gr.HTML("", js_on_load=CLICKS, **PLAIN, elem_id="map")
                    with gr.Column(scale=5, min_width=300):
                        strip = gr.HTML(first.reply, js_on_load=CLICKS, **PLAIN, elem_id="reply")
                checks = gr.HTML(first.checks, **PLAIN, elem_id="checks")
        wrong = gr.HTML("", **PLAIN, elem_id="wrong")
        with gr.Row(elem_id="explain", elem_classes="rlw-stack"):
            with gr.Column(scale=4, min_width=280):
                gr.HTML('<h2 class="rlw">The token</h2>', **PLAIN)
                card = gr.HTML(first.token, **PLAIN, elem_id="card")
            with gr.Column(scale=4, min_width=280):
                gr.HTML('<h2 class="rlw">What else it might have been</h2>', **PLAIN)
                top = gr.HTML(WAITING, **PLAIN, elem_id="top")
                with gr.Row(elem_classes="rlw-stick"):
                    instead = gr.Dropdown([], label="go on with", scale=3, min_width=120, elem_id="instead")
                    fork, cut = gr.Button("Branch", size="sm", scale=1, min_width=70, elem_id="branch", interactive=False), gr.Button("Clear", size="sm", scale=1, min_width=60, elem_id="prune")
            with gr.Column(scale=4, min_width=280):
                gr.HTML('<h2 class="rlw">And with another picture</h2>', **PLAIN)
                ways = gr.HTML(WAITING, **PLAIN, elem_id="ways")
        gr.HTML('<h2 class="rlw">Where it came from</h2>', **PLAIN)
        with gr.Row():
            part, method = gr.Radio(PARTS, value=PARTS[0], label="explain the", elem_id="part"), gr.Dropdown(list(WAYS_TO_ASK), value=WAYS_TO_ASK[0], label="method", elem_id="method")
        because = gr.HTML(WAITING, **PLAIN, elem_id="why")
        over = gr.HTML("", **PLAIN, elem_id="over")
        with gr.Accordion("What the layers would say", open=False, elem_id="lenses", elem_classes="rlw-fold") as inside:
            depths, of_patch = gr.HTML("", **PLAIN, elem_id="depths"), gr.HTML("", **PLAIN, elem_id="patch")
        pair, fill = fold(desk, held, query, QUICK, MODEL)
        with gr.Accordion("Take it along", open=False, elem_id="export", elem_classes="rlw-fold"):
            make, made = gr.Button("Make files", elem_id="make", size="sm"), gr.HTML("", **PLAIN, elem_id="files")

        outputs = [held, query, links, says, strip, checks, card, picture, column, reply, policy, run, step, source, of_run, of_file, of_ink, *pair]
        answers, view = [strip, checks, card, top, instead, ways, over, shades, because, wrong, fork], [held, query]

        def then_ask(event, called):
            return event.then(live, held, answers, api_name=f"{called}_asked", **MODEL)
        then_ask(demo.load(arrive, None, [*outputs, question, part, method, trouble], api_name="inspector_arrive", concurrency_id="model", show_progress="hidden"), "inspector_arrive")
        for box, name in ((run, "run"), (step, "step"), (reply, "reply"), (column, "column"), (policy, "policy")):
            then_ask(box.input(menu(name), [held, box], outputs, api_name=name, **QUICK), name)
        source.input(lambda s: [gr.update(visible=s == x) for x in SOURCES], source, [of_run, of_file, of_ink], api_name="source", **QUICK)
        then_ask(strip.click(token, [held, *said[:2]], [*view, card, checks], api_name="inspector_token", **QUICK), "inspector_token")
        for box in (part, method):
            then_ask(box.input(explain, [held, part, method], view, api_name=box.elem_id, **QUICK), box.elem_id)
        shades.click(patch, [held, said[2]], view, api_name="patch", **QUICK).then(lambda held: lenses(desk, view_of(held)), held, [depths, of_patch], api_name="patch_asked", **MODEL)
        inside.expand(lambda held: lenses(desk, view_of(held)), held, [depths, of_patch], api_name="lenses", **MODEL)
        then_ask(fork.click(branch, [held, instead], [*outputs, wrong], api_name="branch", **MODEL), "branch")
        then_ask(cut.click(prune, held, outputs, api_name="prune", **QUICK), "prune")
        then_ask(file.upload(dropped, file, [*outputs, of_file_says], api_name="file", **QUICK), "file")
        canvas.input(inked, None, [ink, seen], api_name="inked", **QUICK)
        bring.upload(brought, bring, [ink, seen], api_name="bring", **QUICK)
        wipe.click(lambda: (None, "", ""), None, [ink, seen, trouble], api_name="wipe", **QUICK)
        then_ask(go.click(ask, [ink, question, truth], [*outputs, trouble], api_name="ask", **MODEL), "ask")
        make.click(lambda held: files(desk, view_of(held)), held, made, api_name="files", **MODEL)
    return demo


if __name__ == "__main__":
    served(build(Places(), alone=True))
