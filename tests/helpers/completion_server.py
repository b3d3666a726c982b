"""A completions server with vLLM's fields over a model in this process: real requests, its own
sampling loop, adapters loaded by a call.

It stands for what `transformers serve` lacks: token ids in and out, log-probabilities, several
responses per request, adapters by name. `sharpen` multiplies its logits, as a server with other
weights or another precision would.
"""

import json
import threading
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import torch


def sample(model, prompt: list[int], asked: dict, sharpen: float, seed: int) -> dict:
    """One choice: token by token, EOS included, with the log-probabilities at temperature 1."""
    generator, drawn, logps = torch.Generator().manual_seed(seed), [], []
    while len(drawn) < asked["max_tokens"]:
        with torch.no_grad():
            logits = model(torch.tensor([prompt + drawn])).logits[0, -1].double() * sharpen
        token = int(
            torch.multinomial((logits / asked["temperature"]).softmax(-1), 1, generator=generator)
        )
        drawn.append(token)
        logps.append(float(logits.log_softmax(-1)[token]))
        if token in asked["stop_token_ids"]:
            return {
                "finish_reason": "stop",
                "token_ids": drawn,
                "logprobs": {"token_logprobs": logps},
                "text": "?",
            }
    return {
        "finish_reason": "length",
        "token_ids": drawn,
        "logprobs": {"token_logprobs": logps},
        "text": "?",
    }


@contextmanager
def completion_server(load_base, sharpen: float = 1.0):
    """Its address; load_base() gives the model. `requests` of the yielded server holds (path, body)
    of every POST."""
    from peft import PeftModel

    models, requests, lock = {"base": load_base()}, [], threading.Lock()

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self):
            names = [{"id": name, "root": "folder", "max_model_len": 64} for name in models]
            self.answer(
                200,
                json.dumps(
                    {"version": "0"}
                    if self.path == "/version"
                    else {"object": "list", "data": names}
                ),
            )

        def do_POST(self):
            asked = json.loads(self.rfile.read(int(self.headers["content-length"])))
            with lock:
                requests.append((self.path, asked))
                if self.path == "/v1/load_lora_adapter":
                    if asked["lora_name"] in models:
                        return self.answer(
                            400, json.dumps({"error": {"message": "has already been loaded"}})
                        )
                    models[asked["lora_name"]] = PeftModel.from_pretrained(
                        load_base(), asked["lora_path"]
                    ).eval()
                    return self.answer(200, "Success: LoRA adapter added successfully.")
                model = models[asked["model"]]
                choices = [
                    sample(model, asked["prompt"], asked, sharpen, asked["seed"] + k) | {"index": k}
                    for k in range(asked["n"])
                ]
            self.answer(200, json.dumps({"choices": choices[::-1]}))

        def answer(self, status: int, content: str):
            self.send_response(status)
            self.send_header("Content-Length", str(len(content.encode())))
            self.end_headers()
            self.wfile.write(content.encode())

        def log_message(self, *_):
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.requests, server.url = requests, f"http://127.0.0.1:{server.server_port}/v1"
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield server
    finally:
        server.shutdown()
        server.server_close()
