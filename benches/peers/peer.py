#!/usr/bin/env python3
"""Embeds a file of texts with another engine than kandle, tokenizing included; prints one line of JSON.

    python3 benches/peers/peer.py ENGINE DTYPE --model DIR --input FILE.jsonl --threads N [--batch N] [--output FILE]
        [--device cuda]

ENGINE DTYPE: torch (sentence-transformers) f32, bf16 or, on a GPU, f16, onnxruntime f32 or int8, openvino f32 or bf16, tei f32
(text-embeddings-inference over HTTP: TEI is the path of its router; answers are parsed after the clock has stopped).
Texts are sorted by length, in the peer's favour. Without --batch, the fastest of several sizes on the first
texts is taken, before the clock starts. Exported graphs are kept beside the model.
"""

import argparse
import concurrent.futures
import http.client
import json
import os
import pathlib
import resource
import shutil
import socket
import subprocess
import sys
import time


def batches(ids, size):
    order = sorted(range(len(ids)), key=lambda i: -len(ids[i]))
    return [order[i:i + size] for i in range(0, len(order), size)]


def padded(ids, batch, np):
    width = max(len(ids[i]) for i in batch)
    tokens = np.zeros((len(batch), width), dtype=np.int64)
    mask = np.zeros((len(batch), width), dtype=np.int64)
    for row, i in enumerate(batch):
        tokens[row, :len(ids[i])] = ids[i]
        mask[row, :len(ids[i])] = 1
    return tokens, mask


def export(model_dir):
    """Exports the model with pooling and normalization to ONNX, by the exporter with the faster graph; returns the path."""
    path = model_dir / "model.onnx"
    if path.exists():
        return path
    import torch
    from transformers import AutoModel

    if json.loads((model_dir / "config.json").read_text()).get("position_embedding_type") == "alibi":
        sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[2] / "tests" / "fixtures"))
        from jina import Jina
        model = Jina.load(model_dir)
        encode = model.encode
    else:
        model = AutoModel.from_pretrained(model_dir, attn_implementation="eager").eval()
        encode = lambda ids, mask: model(input_ids=ids, attention_mask=mask).last_hidden_state

    class Embed(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.model = model

        def forward(self, input_ids, attention_mask):
            hidden = encode(input_ids, attention_mask)
            mask = attention_mask.unsqueeze(-1).to(hidden.dtype)
            pooled = (hidden * mask).sum(1) / mask.sum(1)
            return torch.nn.functional.normalize(pooled, dim=1)

    ids = torch.tensor([[2, 40, 50, 3], [2, 41, 3, 0]])
    axes = {0: "batch", 1: "tokens"}
    torch.onnx.export(
        Embed(), (ids, (ids != 0).long()), str(path), input_names=["input_ids", "attention_mask"],
        output_names=["embedding"], dynamic_axes={"input_ids": axes, "attention_mask": axes, "embedding": {0: "batch"}},
        opset_version=17, dynamo=False)
    return path


def torch_engine(model_dir, dtype, threads, device):
    import torch
    from sentence_transformers import SentenceTransformer
    torch.set_num_threads(threads)
    kwargs = {"torch_dtype": {"f32": torch.float32, "bf16": torch.bfloat16, "f16": torch.float16}[dtype]}
    model = SentenceTransformer(str(model_dir), device=device, model_kwargs=kwargs)
    return lambda texts, size: model.encode(
        texts, batch_size=size, show_progress_bar=False, convert_to_numpy=True), (
            [8, 16, 32, 64] if device == "cpu" else [32, 64, 128, 256, 512])


def onnx_engine(model_dir, dtype, threads):
    import numpy as np
    import onnxruntime as ort
    from tokenizers import Tokenizer
    path = export(model_dir)
    if dtype == "int8":
        from onnxruntime.quantization import QuantType, quantize_dynamic
        quantized = model_dir / "model.int8.onnx"
        if not quantized.exists():
            # Without VNNI, sums of 8-bit products overflow: weights get seven bits.
            vnni = "vnni" in pathlib.Path("/proc/cpuinfo").read_text()
            quantize_dynamic(str(path), str(quantized), per_channel=True, reduce_range=not vnni, weight_type=QuantType.QInt8)
        path = quantized
    options = ort.SessionOptions()
    options.intra_op_num_threads = threads
    session = ort.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    tokenizer = Tokenizer.from_file(str(model_dir / "tokenizer.json"))
    tokenizer.no_padding()

    def run(texts, size):
        ids = [e.ids for e in tokenizer.encode_batch(texts)]
        rows = [None] * len(texts)
        for batch in batches(ids, size):
            tokens, mask = padded(ids, batch, np)
            for i, row in zip(batch, session.run(None, {"input_ids": tokens, "attention_mask": mask})[0]):
                rows[i] = row
        return np.stack(rows)
    return run, [2, 4, 8, 16, 32]


def openvino_engine(model_dir, dtype, threads):
    import numpy as np
    import openvino as ov
    from tokenizers import Tokenizer
    core = ov.Core()
    model = core.read_model(str(export(model_dir)))
    # One asynchronous stream per core: OpenVINO's fastest way to process many texts.
    compiled = core.compile_model(model, "CPU", {
        "INFERENCE_PRECISION_HINT": dtype, "NUM_STREAMS": str(threads), "INFERENCE_NUM_THREADS": str(threads),
        "PERFORMANCE_HINT": "THROUGHPUT"})
    tokenizer = Tokenizer.from_file(str(model_dir / "tokenizer.json"))
    tokenizer.no_padding()

    def run(texts, size):
        ids = [e.ids for e in tokenizer.encode_batch(texts)]
        rows = [None] * len(texts)

        def done(request, batch):
            for i, row in zip(batch, request.get_output_tensor(0).data):
                rows[i] = row.copy()
        queue = ov.AsyncInferQueue(compiled, 2 * threads)
        queue.set_callback(done)
        for batch in batches(ids, size):
            tokens, mask = padded(ids, batch, np)
            queue.start_async({"input_ids": tokens, "attention_mask": mask}, batch)
        queue.wait_all()
        return np.stack(rows)
    return run, [2, 4, 8, 16]


def export_for_tei(model_dir):
    """Exports the encoder to ONNX without pooling, which TEI does itself; returns the folder."""
    folder = model_dir / "tei"
    if (folder / "model.onnx").exists():
        return folder
    import torch
    from transformers import BertModel

    class Hidden(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.model = BertModel.from_pretrained(model_dir, attn_implementation="eager").eval()

        def forward(self, input_ids, attention_mask, token_type_ids):
            return self.model(
                input_ids=input_ids, attention_mask=attention_mask, token_type_ids=token_type_ids).last_hidden_state

    shutil.copytree(model_dir, folder, ignore=lambda *_: ["tei", "model.safetensors", "model.onnx", "model.int8.onnx"])
    # TEI reads only the older form of this file.
    modes = ["cls_token", "mean_tokens", "max_tokens", "mean_sqrt_len_tokens", "weightedmean_tokens", "lasttoken"]
    (folder / "1_Pooling" / "config.json").write_text(json.dumps({
        "word_embedding_dimension": json.loads((folder / "config.json").read_text())["hidden_size"],
        **{f"pooling_mode_{mode}": mode == "mean_tokens" for mode in modes}}))
    ids = torch.tensor([[2, 40, 50, 3], [2, 41, 3, 0]])
    names = ["input_ids", "attention_mask", "token_type_ids"]
    torch.onnx.export(
        Hidden(), (ids, (ids != 0).long(), ids * 0), str(folder / "model.onnx"), input_names=names,
        output_names=["last_hidden_state"], opset_version=17, dynamo=False,
        dynamic_axes={name: {0: "batch", 1: "tokens"} for name in [*names, "last_hidden_state"]})
    return folder


def tei_engine(model_dir, dtype, threads):
    """Starts the router with its ONNX backend, like its CPU image. The router batches concurrent requests itself."""
    import atexit

    import numpy as np
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    router = subprocess.Popen(
        [os.environ["TEI"], "--model-id", str(export_for_tei(model_dir)), "--dtype", {"f32": "float32"}[dtype],
         "--hostname", "127.0.0.1", "--port", str(port), "--prometheus-port", "0", "--max-client-batch-size", "64",
         "--max-batch-tokens", "4096", "--tokenization-workers", str(threads), "--auto-truncate"],
        stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    atexit.register(router.kill)

    def ask(method, path, body=None):
        connection = http.client.HTTPConnection("127.0.0.1", port)
        connection.request(method, path, body, {"Content-Type": "application/json"})
        response = connection.getresponse()
        return response.status, response.read()

    while True:
        if router.poll() is not None:
            raise SystemExit(f"the router ended with {router.returncode}")
        try:
            if ask("GET", "/health")[0] == 200:
                break
        except OSError:
            time.sleep(0.1)

    def run(texts, size):
        order = sorted(range(len(texts)), key=lambda i: -len(texts[i]))
        parts = [order[i:i + size] for i in range(0, len(order), size)]

        def embed(part):
            status, answer = ask("POST", "/embed", json.dumps({"inputs": [texts[i] for i in part], "normalize": True}))
            if status != 200:
                raise SystemExit(answer.decode())
            return answer

        with concurrent.futures.ThreadPoolExecutor(4 * threads) as pool:
            answers = list(pool.map(embed, parts))

        def rows():
            rows = [None] * len(texts)
            for part, answer in zip(parts, answers):
                for i, row in zip(part, json.loads(answer)):
                    rows[i] = row
            return np.array(rows)
        return rows

    def memory():
        status = pathlib.Path(f"/proc/{router.pid}/status").read_text()
        return next(int(line.split()[1]) * 1024 for line in status.splitlines() if line.startswith("VmHWM"))
    run.memory = memory
    return run, [4, 8, 16, 32]


ENGINES = {"torch": torch_engine, "onnxruntime": onnx_engine, "openvino": openvino_engine, "tei": tei_engine}


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("engine", choices=ENGINES)
    parser.add_argument("dtype")
    parser.add_argument("--model", type=pathlib.Path, required=True)
    parser.add_argument("--input", type=pathlib.Path, required=True)
    parser.add_argument("--threads", type=int, required=True)
    parser.add_argument("--batch", type=int)
    parser.add_argument("--output", type=pathlib.Path)
    parser.add_argument("--device", default="cpu", help="cpu, or for torch cuda")
    args = parser.parse_args()
    os.environ["TOKENIZERS_PARALLELISM"] = "true"
    os.environ["RAYON_NUM_THREADS"] = os.environ["OMP_NUM_THREADS"] = str(args.threads)
    texts = [json.loads(line)["text"] for line in args.input.read_text().splitlines()]
    of_device = {"device": args.device} if args.engine == "torch" else {}
    run, sizes = ENGINES[args.engine](args.model, args.dtype, args.threads, **of_device)
    run(texts[:16], 8)
    batch = args.batch
    if batch is None:
        sample = texts[:max(100, len(texts) // 8)]
        times = {}
        for size in sizes * 2:
            started = time.perf_counter()
            run(sample, size)
            times[size] = min(times.get(size, 1e9), time.perf_counter() - started)
        batch = min(times, key=times.get)
    started = time.perf_counter()
    rows = run(texts, batch)
    seconds = time.perf_counter() - started
    rows = rows() if callable(rows) else rows
    memory = run.memory() if hasattr(run, "memory") else resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    from tokenizers import Tokenizer
    tokenizer = Tokenizer.from_file(str(args.model / "tokenizer.json"))
    tokenizer.no_padding()
    tokens = sum(len(e.ids) for e in tokenizer.encode_batch(texts))
    if args.output:
        args.output.write_text("".join(json.dumps({"embedding": [float(x) for x in row]}) + "\n" for row in rows))
    print(json.dumps({
        "records": len(texts), "tokens": tokens, "seconds": seconds, "records_per_second": len(texts) / seconds,
        "tokens_per_second": tokens / seconds, "peak_rss_bytes": memory,
        "dtype": args.dtype, "device": args.device, "batch": batch}))


if __name__ == "__main__":
    main()
