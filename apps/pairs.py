"""The fold of the inspector in which a second reply is chosen and laid beside the first. Not a page: the inspector puts it where it belongs."""
from dataclasses import asdict

import gradio as gr

from rlworkbench.serving.frame import told
from rlworkbench.serving.inspection import Inspection, sentence
from rlworkbench.serving.moves import changed, handed_in
from rlworkbench.serving.pairs import WHERE, laid_beside, neighbours, second_of
from rlworkbench.serving.view import View, view_of

def fold(desk: Inspection, held: gr.State, query: gr.HTML, quick: dict, model: dict) -> tuple:
    "Boxes and wires. What comes back: the boxes, and what fills them for a view."
    with gr.Accordion("Beside another reply, run, file or policy", open=False, elem_id="beside", elem_classes="rlw-fold") as pair:
        where = gr.Radio([*WHERE], value=WHERE[0], label="lay beside it something of", elem_id="where")
        with gr.Row(elem_classes="rlw-stack"):
            against = gr.Dropdown([], label="a reply of this step, or a policy", elem_id="against")
            run2, step2 = gr.Dropdown([], label="run", visible=False, elem_id="run2", filterable=True), gr.Dropdown([], label="step", visible=False, elem_id="step2")
            reply2 = gr.Dropdown([], label="reply", visible=False, elem_id="reply2")
        file2 = gr.File(label="traces, in any of the formats that are read above", type="filepath", height=100, visible=False, elem_id="file2")
        both = gr.HTML("", padding=False, elem_id="both")
    boxes, view = [where, against, run2, step2, reply2, file2, both], [held, query]

    def fill(view: View, at: str="", asked: bool=False) -> list:
        "What the boxes show; without `asked` no policy is, and what it said stays."
        s = second_of(desk, view, at)
        here, run, file = (s.where == w for w in WHERE)
        policy = view.against and not view.against.startswith("reply ")
        return [s.where, gr.update(visible=here, value=view.against or None, **({"choices": neighbours(desk, view)} if asked and here else {})),
                gr.update(visible=run, value=view.run2 or None, **({"choices": desk.places.names()} if run else {})), gr.update(visible=run, choices=s.steps, value=s.step),
                gr.update(visible=not here and bool(s.replies), choices=[*s.replies], value=s.reply), gr.update(visible=file), gr.skip() if policy and not asked else laid_beside(desk, view, s.where)]

    def choose(name: str):
        return lambda held, value: answer(changed(view_of(held), name, value))

    def answer(view: View) -> list:
        return [asdict(view), view.query, *fill(view, asked=True)]

    def dropped(held, file):
        try:
            return answer(changed(view_of(held), "trace2", handed_in(desk, file).trace))
        except (ValueError, OSError) as e:
            return [gr.skip()] * (len(view) + len(boxes) - 1) + [told("error", sentence(str(e)))]

    pair.expand(lambda held: fill(view_of(held), asked=True), held, boxes, api_name="beside", **model)
    where.input(lambda held, at: fill(view_of(held), at, asked=True), [held, where], boxes, api_name="beside_where", **model)
    for box in (against, run2, step2, reply2):
        box.input(choose(box.elem_id), [held, box], [*view, *boxes], api_name=f"beside_{box.elem_id}", **(model if box is against else quick))
    file2.upload(dropped, [held, file2], [*view, *boxes], api_name="beside_file", **quick)
    return boxes, fill
