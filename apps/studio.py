"""The studio: all pages as one app on this machine. `rlworkbench studio`, or `python apps/studio.py`."""
import importlib
from inspect import signature

import gradio as gr

from rlworkbench.serving.frame import PAGES, served
from rlworkbench.serving.hub import hub
from rlworkbench.serving.places import Places

def build(places: Places) -> gr.Blocks:
    "The first page: a run on screen at once; `?run=` chooses another."
    def look(request: gr.Request):
        return hub(places, request.query_params.get("run") if request else None)

    def runs(name: str = "") -> str:
        return hub(places, name or None)

    with gr.Blocks(title="rlworkbench studio", analytics_enabled=False, delete_cache=(3600, 3600)) as demo:
        shown = gr.HTML(hub(places), padding=False, elem_id="hub")
        demo.load(look, None, shown, queue=False, show_progress="hidden", api_name="hub")
        name, asked = gr.Textbox(visible=False), gr.Button(visible=False)
        asked.click(runs, name, shown, queue=False, api_name="hub_of")
    return demo


def studio(places: Places, **options) -> gr.Blocks:
    "All pages that this installation has; options go to the pages that know them."
    demo = build(places)
    for page in (p for p in PAGES if p.path and p.there):
        build_page = importlib.import_module(f"rlworkbench.apps.{page.path}").build
        blocks = build_page(places, **{k: v for k, v in options.items() if k in signature(build_page).parameters})
        with demo.route(page.name, f"/{page.path}"):
            blocks.render()
    return demo


if __name__ == "__main__":
    served(studio(Places()))
