"""`blip3o demo`: a web page on which to draw, talk and edit with one model. Needs Gradio, the extra `[demo]`.

All that the page is made of comes from this machine (no fonts or scripts from elsewhere, no telemetry, no tunnel), so
it works on a closed network. Requests take turns on the device. What is uploaded and drawn lies in a temporary folder
that goes when the server ends.
"""

import functools
import html
import os
import random
import socket
import tempfile
import time
from pathlib import Path

import numpy as np

from blip3o_jax.apps.buttons import MOST_PICTURES, Buttons, working
from blip3o_jax.data import shapes
from blip3o_jax.errors import UserError
from blip3o_jax.inference.dialogue import Dialogue
from blip3o_jax.inference.model import Model, load_here
from blip3o_jax.inference.prompts import bucket

_PRIVATE = {"GRADIO_ANALYTICS_ENABLED": "False", "GRADIO_RUN_HISTORY": "False", "HF_HUB_DISABLE_TELEMETRY": "1"}
_PROMPTS = (
  "a red panda reading a newspaper in a small café",
  "a lighthouse on a cliff in a storm, oil painting",
  "a bowl of ramen on a wooden table, seen from above",
  "a paper boat on a calm lake at dawn",
)
_QUESTIONS = ("What is in this picture?", "Which colours do you see?")
_INSTRUCTIONS = ("Make it a watercolour.", "The same place at night.")
_SHAPES_PROMPTS = (
  "a purple circle and an orange square",
  "three circles",
  "a red cross on a white background",
  "a yellow circle above a blue square",
  "three orange triangles on a gray background",
)
_SHAPES_QUESTIONS = ("what colour is the circle?", "how many squares are there?")
_SHAPES_INSTRUCTIONS = ("a yellow circle", "a green circle and an orange square")


def run(
  model_name: str | Path, host: str, port: int, *, fsdp: int = 1, compile_cache: str | Path | None = None
) -> None:
  """Serve the page until Ctrl-C.

  Args:
    model_name, fsdp: see inference.model.load_here. port: 0 takes a free one; the address is printed.

  Raises:
    UserError: Gradio is missing, the address cannot be had, or the model cannot be opened.
  """
  with tempfile.TemporaryDirectory(prefix="blip3o-demo-") as folder:
    os.environ |= {**_PRIVATE, "GRADIO_TEMP_DIR": folder}  # read when gradio is imported
    try:
      import gradio  # noqa: F401
    except ImportError:
      raise UserError("the page needs Gradio: pip install 'blip3o_jax[demo]'") from None
    with _listen(host, port) as listening:
      try:
        model = load_here(model_name, fsdp=fsdp, compile_cache=compile_cache)
        print("compiling what the page needs; it opens when that is done ...", flush=True)
        print(f"compiled in {warm_up(model):.0f} s", flush=True)
        _serve(page(Buttons(model, Path(folder))), listening)
      except KeyboardInterrupt:
        print("closed", flush=True)


def warm_up(model: Model) -> float:
  """Compile what first requests need; returns the seconds. What the model cannot do is printed.

  Raises:
    UserError: it has no language model, which all of the page needs.
  """
  start = time.perf_counter()
  model.talk_settings()
  prompts, questions, instructions = examples(model)
  side = model.model.cfg.image_size
  picture = np.full((side, side, 3), 128, np.uint8)
  answer = lambda: next(Dialogue(model).say(questions[0], [picture]))  # the first piece compiles all
  lengths = {bucket(len(model.row_to_draw(prompt, model.sampling).tokens)): prompt for prompt in prompts}
  for what, work in (
    ("draw", lambda: [model.generate(prompt) for prompt in lengths.values()]),
    ("answer questions on pictures", answer),
    ("edit pictures", lambda: model.edit(picture, instructions[0])),
    ("reconstruct pictures", lambda: model.reconstruct(picture)),
  ):
    try:
      work()
    except UserError as error:
      print(f"this model cannot {what}: {error}", flush=True)
  return time.perf_counter() - start


def examples(model: Model) -> tuple[tuple[str, ...], tuple[str, ...], tuple[str, ...]]:
  """Prompts, questions and instructions that suit the model; the world of shapes is known by its small pictures."""
  if model.model.cfg.image_size == shapes.SIZE:
    return _SHAPES_PROMPTS, _SHAPES_QUESTIONS, _SHAPES_INSTRUCTIONS
  return _PROMPTS, _QUESTIONS, _INSTRUCTIONS


def _listen(host: str, port: int) -> socket.socket:
  try:
    return socket.create_server((host, port), family=socket.AF_INET6 if ":" in host else socket.AF_INET)
  except OSError as error:
    raise UserError(
      f"cannot listen on {host}, port {port} ({error.strerror}); give another --host or --port, 0 takes a free port"
    ) from None


def _serve(blocks, listening: socket.socket) -> None:
  import uvicorn

  host, port = listening.getsockname()[:2]
  print(f"open http://{f'[{host}]' if ':' in host else host}:{port} (Ctrl-C ends it)", flush=True)
  server = uvicorn.Server(uvicorn.Config(_mounted(blocks), log_level="critical", timeout_graceful_shutdown=1))
  server.run(sockets=[listening])


def _mounted(blocks):
  """The page as an ASGI application."""
  import fastapi
  import gradio

  # Mounted by ourselves, not by gradio's launch(): that looks for tunnels and updates, and waits long for open pages
  # when it ends. A page that has not launched takes any path of this machine for an upload, and copies and serves it.
  blocks.has_launched = blocks.is_running = True
  return gradio.mount_gradio_app(
    fastapi.FastAPI(openapi_url=None),
    blocks,
    path="/",
    theme=_theme(),
    css=_CSS,
    footer_links=[],
    ssr_mode=False,
    pwa=False,
    mcp_server=False,
    enable_monitoring=False,
  )


# ---- the page


def page(buttons: Buttons):
  """The page, a gradio.Blocks: three tabs, and under them the settings that all of them draw with."""
  import gradio

  model = buttons.model
  prompts, questions, instructions = examples(model)
  with gradio.Blocks(analytics_enabled=False, title="BLIP3-o", delete_cache=(3600, 86400)) as blocks:
    name = html.escape(model.name)
    gradio.HTML(f"<h1>BLIP3-o</h1><p>Draw with <b>{name}</b>, ask it, change what it drew.</p>", elem_id="head")
    with gradio.Accordion("Settings of all that is drawn", open=False, render=False) as settings:
      with gradio.Row():  # numbers, not sliders: these would mend what is out of bounds without a word
        seed = gradio.Number(0, label="Seed", elem_id="seed", min_width=90)
        guidance = gradio.Number(model.sampling.guidance, label="Guidance", step=0.5, elem_id="guidance", min_width=90)
        steps = gradio.Number(model.sampling.steps, label="Steps", elem_id="steps", min_width=90)
      with gradio.Row():
        another = gradio.Button("Another seed", size="sm", scale=0, min_width=140)
      gradio.HTML("The same seed draws the same pictures. New guidance or steps compile first.", elem_classes="note")
    drawing = [seed, guidance, steps]
    on = functools.partial(_on, buttons)
    with gradio.Tab("Draw"):
      with gradio.Row(elem_id="drawing"):
        with gradio.Column(min_width=300):
          prompt = gradio.Textbox(label="Prompt", placeholder=prompts[0], lines=2, max_lines=8, elem_id="prompt")
          num = gradio.Slider(1, MOST_PICTURES, 4, step=1, label="Pictures", elem_id="num")
          draw = gradio.Button("Draw", variant="primary", elem_id="draw")
          status = gradio.HTML(elem_id="draw-status")
        with gradio.Column(min_width=300):
          gallery = gradio.Gallery(
            show_label=False, columns=2, object_fit="contain", height="auto", elem_id="gallery", interactive=False,
            buttons=["download", "download_all", "fullscreen"],
          )  # fmt: skip
        with gradio.Column(min_width=300):
          gradio.Examples([[words] for words in prompts], prompt, label="For example")
      inputs, parts = [prompt, num, *drawing], {"gallery": gallery, "status": status}
      on([draw.click, prompt.submit], buttons.draw, inputs, parts)

    with gradio.Tab("Talk"):
      talk = gradio.State()
      hint = f"Show it a picture and ask: *{questions[0]}*<br>Or say what to draw next: *{prompts[0]}*"
      chat = gradio.Chatbot(show_label=False, height="22rem", buttons=[], placeholder=hint, elem_id="chat")
      asked = gradio.MultimodalTextbox(
        show_label=False, placeholder="Ask, or say what to draw next", file_count="multiple",
        submit_btn=False, elem_id="asked",
      )  # fmt: skip
      with gradio.Row():
        say = gradio.Button("Answer", variant="primary", elem_id="say", min_width=100)
        draw = gradio.Button("Draw", elem_id="draw-next", min_width=100)
      status = gradio.HTML(elem_id="talk-status")
      parts = {"chat": chat, "asked": asked, "talk": talk, "status": status}
      on([say.click, asked.submit], buttons.say, [asked, talk], parts)
      on([draw.click], buttons.draw_next, [asked, talk, *drawing], parts)
      chat.clear(lambda: (None, ""), outputs=[talk, status], api_visibility="private")

    with gradio.Tab("Edit"):
      with gradio.Row():
        picture = gradio.Image(label="Picture", sources=["upload", "clipboard"], height="20rem", elem_id="picture")
        # The file as it came: what is wrong with it is then told in our words.
        picture.preprocess = lambda upload: upload.path if upload else None
        edited = gradio.Image(
          label="Drawn anew", interactive=False, height="20rem", elem_id="edited", buttons=["download"]
        )
      instruction = gradio.Textbox(label="Instruction", placeholder=instructions[0], elem_id="instruction")
      with gradio.Row():
        edit = gradio.Button("Edit", variant="primary", elem_id="edit")
        again = gradio.Button("Reconstruct", elem_id="reconstruct")
      status = gradio.HTML(elem_id="edit-status")
      gradio.Examples([[words] for words in instructions], instruction, label="For example")
      gradio.HTML(
        "An instruction is followed as far as the model has learned to: no editing data exists for BLIP3-o. "
        "Reconstruct draws the picture again from its CLIP features.", elem_classes="note",
      )  # fmt: skip
      parts = {"edited": edited, "status": status}
      on([edit.click, instruction.submit], buttons.edit, [picture, instruction, *drawing], parts)
      on([again.click], buttons.reconstruct, [picture, seed], parts)

    settings.render()
    another.click(lambda: random.randrange(2**32), outputs=seed, api_visibility="private")
  return blocks


def _on(buttons: Buttons, events, work, inputs, parts) -> None:
  """Let events start `work`. All work is one at a time: the device has room for one."""
  import gradio

  def said(*values):
    for news in buttons.spoken(work, *values):
      yield {parts[name]: value for name, value in news.items()}

  # At once, without a place in the queue.
  waiting = gradio.on(
    events, lambda: working("Waiting for its turn"), outputs=parts["status"], queue=False, api_visibility="private"
  )
  waiting.then(
    said,
    inputs,
    list(parts.values()),
    show_progress="hidden",
    concurrency_limit=1,
    concurrency_id="device",
    api_visibility="private",
  )


def _theme():
  import gradio

  font = [gradio.themes.utils.fonts.LocalFont("IBM Plex Sans", weights=(400, 700)), "system-ui", "sans-serif"]
  return gradio.themes.Default(primary_hue="teal", neutral_hue="stone", radius_size="lg", font=font)


_CSS = """
.gradio-container { max-width: 1040px !important; width: 100%; margin: 0 auto !important; }
#head h1 { font-weight: 700; font-size: 1.8rem; letter-spacing: -0.02em; margin: 0.5rem 0 0; }
#head p { color: var(--body-text-color-subdued); margin: 0.1rem 0 0; }
.note, .note * { color: var(--body-text-color-subdued) !important; font-size: var(--text-sm); }
#chat img { width: 11rem; height: 11rem; object-fit: contain; }
#chat .placeholder { text-align: center; padding: 1rem; }
#chat button[title="Share"], #chat button[aria-label="Share"] { display: none; }
#picture img, #edited img { width: 100%; height: 100%; object-fit: contain; }
@media (min-width: 800px) {  /* on a phone the pictures lie between the button and the examples */
  #drawing { display: grid; grid-template: auto 1fr / 2fr 3fr; }
  #drawing > :nth-child(2) { grid-area: 1 / 2 / 3 / 3; }
}
#gallery .grid-wrap { max-height: none !important; overflow: visible; }
.line { min-height: 1.6rem; display: flex; gap: 0.8rem; align-items: center; }
.line span { color: var(--body-text-color-subdued) !important; }
.line.wrong span { color: #b42318 !important; }
.dark .line.wrong span { color: #fda29b !important; }
.line progress { appearance: none; flex: 1 1 5rem; max-width: 14rem; height: 0.4rem; border: 0; border-radius: 1rem;
  overflow: hidden; background: var(--border-color-primary); }
.line progress::-webkit-progress-bar { background: var(--border-color-primary); }
.line progress::-webkit-progress-value { background: var(--color-accent); transition: width 0.4s; }
.line progress::-moz-progress-bar { background: var(--color-accent); }
"""
