"""A completions server over a model in this process: real requests, its own sampling loop, adapters
loaded by a call.

With vLLM's fields it stands for what `transformers serve` lacks: token ids in and out,
log-probabilities, several responses per request, adapters by name. With a tokenizer it takes and
gives text alone, as `transformers serve` does. `Faults` are those of servers that look right.
"""

import json
import threading
from contextlib import contextmanager
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import torch


@dataclass
class Faults:
    """What is wrong with a server. sharpen: multiplies its logits, as another precision would;
    ends: added to the logits of EOS in what it draws, not in what it says of it; ignores_adapters:
    the base answers for them; leaks: the first adapter that was loaded answers for the base, and
    goes on when it is unloaded. top_p is never heeded."""

    sharpen: float = 1.0
    ends: float = 0.0
    ignores_adapters: bool = False
    leaks: bool = False


def sample(model, prompt: list[int], law: dict, faults: Faults, seeds: list[int]) -> list[dict]:
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
        rows = output.logits[:, -1].double() * faults.sharpen
        for choice, logits in zip(unfinished, rows, strict=True):
            shifted = logits.clone()
            shifted[law["stop_token_ids"]] += faults.ends
            weights = (shifted / law["temperature"]).softmax(-1)
            token = int(torch.multinomial(weights, 1, generator=generators[choice["index"]]))
            choice["token_ids"].append(token)
            choice["token_logprobs"].append(float(logits.log_softmax(-1)[token]))
            if token in law["stop_token_ids"]:
                choice["finish_reason"] = "stop"
    for choice in choices:
        choice["logprobs"] = {"token_logprobs": choice.pop("token_logprobs")}
    return choices


def text_answer(model, tokenizer, body: dict, faults: Faults) -> dict:
    """The answer of a server that takes and gives text: one response, and how long it was."""
    config = json.loads(body["generation_config"])
    law = {"temperature": config["temperature"], "stop_token_ids": config["eos_token_id"]}
    prompt = tokenizer(body["prompt"])["input_ids"]
    (choice,) = sample(model, prompt, body | law, faults, [body["seed"]])
    ids = choice["token_ids"]
    text = tokenizer.decode(ids, skip_special_tokens=True)
    return {
        "choices": [{"index": 0, "finish_reason": choice["finish_reason"], "text": text}],
        "usage": {"completion_tokens": len(ids)},
    }


@contextmanager
def completion_server(load_base, faults: Faults = Faults(), tokenizer=None):
    """Its address; load_base() gives the model. `requests` of the yielded server holds (path, body)
    of every POST; `forget` drops the adapters, as a restart does."""
    from peft import PeftModel

    models, requests, lock = {"base": load_base()}, [], threading.Lock()
    leaked = []

    def forget():
        for name in set(models) - {"base"}:
            del models[name]

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
                if self.path == "/v1/unload_lora_adapter":
                    models.pop(body["lora_name"], None)
                    return self.answer(200, "Success: LoRA adapter removed successfully.")
                if body["model"] not in models:
                    words = f"The model `{body['model']}` does not exist."
                    return self.answer(404, {"error": {"message": words}})
                model = models["base" if faults.ignores_adapters else body["model"]]
                if faults.leaks and model is models["base"] and leaked:
                    model = leaked[0]
                if tokenizer is not None:
                    return self.answer(200, text_answer(model, tokenizer, body, faults))
                seeds = [body["seed"] + k for k in range(body["n"])]
                choices = sample(model, body["prompt"], body, faults, seeds)
            self.answer(200, {"choices": choices[::-1]})

        def load(self, name: str, folder: str):
            if name in models:
                return self.answer(400, {"error": {"message": "has already been loaded"}})
            models[name] = PeftModel.from_pretrained(load_base(), folder).eval()
            leaked.append(models[name])
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
    server.forget, server.models = forget, models
    server.requests, server.url = requests, f"http://127.0.0.1:{server.server_port}/v1"
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield server
    finally:
        server.shutdown()
        server.server_close()
