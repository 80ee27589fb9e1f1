"""Runs and seeds beside each other, claims with their verdicts, the paper index. Alone: `python apps/compare.py`."""
import gradio as gr

from rlworkbench.serving.compare import arms_of, beside, columns_of, compared, link
from rlworkbench.serving.frame import bar, served
from rlworkbench.serving.keys import ADDRESS
from rlworkbench.serving.papers import claims_html, papers_html
from rlworkbench.serving.places import Places

KEEP = "(runs, column) => String(new URLSearchParams({runs: (runs || []).join(';'), column: column || ''}))"


def build(places: Places, alone: bool=False) -> gr.Blocks:
    "`?runs=A;B&column=entropy&open=claims` restores a comparison and its tab; `?run=A` begins with that run and others of its task."
    def measures(runs: list, column: str) -> tuple:
        found = columns_of(arms_of(places, runs)[0]) or [column or ""]
        return found, column if column in found else found[0]

    def first(query: dict) -> tuple:
        names = places.names()
        asked = [r for r in str(query.get("runs", "")).split(";") if r]
        chosen = asked or (beside(places, query.get("run") or places.default()) if names else [])
        found, column = measures(chosen, query.get("column") or "correct")
        return list(dict.fromkeys([*names, *chosen])), chosen, found, column

    def start(request: gr.Request):
        names, chosen, found, column = first(dict(request.query_params) if request else {})
        return gr.update(choices=names, value=chosen), gr.update(choices=found, value=column), compared(places, chosen, column), link(chosen, column).partition("?")[2]

    def look(runs: list[str], column: str) -> str:
        return compared(places, runs or [], column)

    def change(runs: list[str], column: str):
        found, column = measures(runs or [], column)
        return gr.update(choices=found, value=column), compared(places, runs or [], column)

    names, chosen, found, column = first({})
    with gr.Blocks(title="rlworkbench: compare", analytics_enabled=False, delete_cache=(3600, 3600)) as demo:
        gr.HTML(f'<div class="rlw-page">{bar("compare", alone)}<div class="rlw"><h1>Compare</h1></div></div>', padding=False)
        query = gr.HTML("", js_on_load=ADDRESS, padding=False, elem_id="address", elem_classes="rlw-hidden")
        with gr.Tab("Runs", id="runs"):
            with gr.Row():
                runs = gr.Dropdown(choices=names, value=chosen, multiselect=True, max_choices=24, label="runs", allow_custom_value=True, scale=3)
                measure = gr.Dropdown(choices=found, value=column, label="measure", allow_custom_value=True, scale=1)
            shown = gr.HTML(compared(places, chosen, column), padding=False, elem_id="compared")
        with gr.Tab("Claims", id="claims") as claims_tab:
            claims = gr.HTML('<div class="rlw rlw-note">Reading the results …</div>', padding=False)
        with gr.Tab("Papers", id="papers") as papers_tab:
            papers = gr.HTML('<div class="rlw rlw-note">Reading the index …</div>', padding=False)
        quick = dict(queue=False, show_progress="hidden")
        demo.load(start, None, [runs, measure, shown, query], api_name="compare_start", **quick)
        runs.input(change, [runs, measure], [measure, shown], api_name="compare_runs", **quick)
        measure.input(look, [runs, measure], shown, api_name="compare_measure", **quick)
        for control in (runs, measure):
            control.change(None, [runs, measure], query, js=KEEP, api_name=False)
        claims_tab.select(claims_html, None, claims, api_name="compare_claims", **quick)
        papers_tab.select(papers_html, None, papers, api_name="compare_papers", **quick)
    return demo


if __name__ == "__main__":
    served(build(Places(), alone=True))
