"""A completions server over a model in this process: real requests, its own sampling loop, adapters
loaded by a call.

With vLLM's fields it stands for what `transformers serve` lacks: token ids in and out,
log-probabilities, several responses per request, adapters by name. With a tokenizer it takes and
gives text alone, as `transformers serve` does. `sharpen` multiplies its logits, as a server with
other weights or another precision would.
"""

import json
import threading
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import torch


def sample(model, prompt: list[int], law: dict, sharpen: float, seeds: list[int]) -> list[dict]:
    """A choice per seed: token by token, EOS included, with the log-probabilities at temperature
    1."""
    choices = [
        {"index": k, "finish_reason": "length", "token_ids": [], "token_logprobs": [], "text": "?"}
        for k in range(len(seeds))
    ]
    generators = [torch.Generator().manual_seed(seed) for seed in seeds]
    for _ in range(law["max_tokens"]):
        unfinished = [c for c in choices if c["finish_reason"] == "length"]
        if not unfinished:
            break
        with torch.no_grad():
            output = model(torch.tensor([prompt + c["token_ids"] for c in unfinished]))
        for choice, logits in zip(unfinished, output.logits[:, -1].double() * sharpen, strict=True):
            weights = (logits / law["temperature"]).softmax(-1)
            token = int(torch.multinomial(weights, 1, generator=generators[choice["index"]]))
            choice["token_ids"].append(token)
            choice["token_logprobs"].append(float(logits.log_softmax(-1)[token]))
            if token in law["stop_token_ids"]:
                choice["finish_reason"] = "stop"
    for choice in choices:
        choice["logprobs"] = {"token_logprobs": choice.pop("token_logprobs")}
    return choices


def text_answer(model, tokenizer, body: dict, sharpen: float) -> dict:
    """The answer of a server that takes and gives text: one response, and how long it was."""
    config = json.loads(body["generation_config"])
    law = {"temperature": config["temperature"], "stop_token_ids": config["eos_token_id"]}
    prompt = tokenizer(body["prompt"])["input_ids"]
    (choice,) = sample(model, prompt, body | law, sharpen, [body["seed"]])
    ids = choice["token_ids"]
    text = tokenizer.decode(ids, skip_special_tokens=True)
    return {
        "choices": [{"index": 0, "finish_reason": choice["finish_reason"], "text": text}],
        "usage": {"completion_tokens": len(ids)},
    }


@contextmanager
def completion_server(load_base, sharpen: float = 1.0, tokenizer=None):
    """Its address; load_base() gives the model. `requests` of the yielded server holds (path, body)
    of every POST."""
    from peft import PeftModel

    models, requests, lock = {"base": load_base()}, [], threading.Lock()

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self):
            names = [{"id": name, "root": "folder", "max_model_len": 64} for name in models]
            version = self.path == "/version"
            self.answer(200, {"version": "0"} if version else {"object": "list", "data": names})

        def do_POST(self):
            body = json.loads(self.rfile.read(int(self.headers["content-length"])))
            with lock:
                requests.append((self.path, body))
                if self.path == "/v1/load_lora_adapter":
                    return self.load(body["lora_name"], body["lora_path"])
                model = models[body["model"]]
                if tokenizer is not None:
                    return self.answer(200, text_answer(model, tokenizer, body, sharpen))
                seeds = [body["seed"] + k for k in range(body["n"])]
                choices = sample(model, body["prompt"], body, sharpen, seeds)
            self.answer(200, {"choices": choices[::-1]})

        def load(self, name: str, folder: str):
            if name in models:
                return self.answer(400, {"error": {"message": "has already been loaded"}})
            models[name] = PeftModel.from_pretrained(load_base(), folder).eval()
            self.answer(200, "Success: LoRA adapter added successfully.")

        def answer(self, status: int, content: dict | str):
            text = content if isinstance(content, str) else json.dumps(content)
            self.send_response(status)
            self.send_header("Content-Length", str(len(text.encode())))
            self.end_headers()
            self.wfile.write(text.encode())

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
