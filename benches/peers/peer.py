#!/usr/bin/env python3
"""One of today's ways to embed a file of texts, once, tokenising included; the result as one line of JSON.

    python3 benches/peers/peer.py ENGINE DTYPE --model DIR --input FILE.jsonl --threads N [--batch N] [--output FILE]

ENGINE DTYPE: torch (sentence-transformers) f32 or bf16, onnxruntime f32 or int8, openvino f32 or bf16.
Texts are sorted by length, in the peer's favour. Without --batch, the fastest of several on the first
texts is taken, before the clock starts. Exported graphs are kept beside the model.
"""

import argparse
import json
import os
import pathlib
import resource
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
    """The model with pooling and normalisation as ONNX, by the exporter whose graph is the faster one."""
    path = model_dir / "model.onnx"
    if path.exists():
        return path
    import torch
    from transformers import BertModel

    class Embed(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.model = BertModel.from_pretrained(model_dir, attn_implementation="eager").eval()

        def forward(self, input_ids, attention_mask):
            hidden = self.model(input_ids=input_ids, attention_mask=attention_mask).last_hidden_state
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


def torch_engine(model_dir, dtype, threads):
    import torch
    from sentence_transformers import SentenceTransformer
    torch.set_num_threads(threads)
    kwargs = {"torch_dtype": {"f32": torch.float32, "bf16": torch.bfloat16}[dtype]}
    model = SentenceTransformer(str(model_dir), device="cpu", model_kwargs=kwargs)
    return lambda texts, size: model.encode(
        texts, batch_size=size, show_progress_bar=False, convert_to_numpy=True), [8, 16, 32, 64]


def onnx_engine(model_dir, dtype, threads):
    import numpy as np
    import onnxruntime as ort
    from tokenizers import Tokenizer
    path = export(model_dir)
    if dtype == "int8":
        from onnxruntime.quantization import QuantType, quantize_dynamic
        quantized = model_dir / "model.int8.onnx"
        if not quantized.exists():
            # Seven bits of a weight: without VNNI, sums of eight bits overflow.
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
    # One stream a core, asynchronous: its fastest way to work off many texts.
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


ENGINES = {"torch": torch_engine, "onnxruntime": onnx_engine, "openvino": openvino_engine}


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("engine", choices=ENGINES)
    parser.add_argument("dtype")
    parser.add_argument("--model", type=pathlib.Path, required=True)
    parser.add_argument("--input", type=pathlib.Path, required=True)
    parser.add_argument("--threads", type=int, required=True)
    parser.add_argument("--batch", type=int)
    parser.add_argument("--output", type=pathlib.Path)
    args = parser.parse_args()
    os.environ["TOKENIZERS_PARALLELISM"] = "true"
    os.environ["RAYON_NUM_THREADS"] = os.environ["OMP_NUM_THREADS"] = str(args.threads)
    texts = [json.loads(line)["text"] for line in args.input.read_text().splitlines()]
    run, sizes = ENGINES[args.engine](args.model, args.dtype, args.threads)
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
    from tokenizers import Tokenizer
    tokenizer = Tokenizer.from_file(str(args.model / "tokenizer.json"))
    tokenizer.no_padding()
    tokens = sum(len(e.ids) for e in tokenizer.encode_batch(texts))
    if args.output:
        args.output.write_text("".join(json.dumps({"embedding": [float(x) for x in row]}) + "\n" for row in rows))
    print(json.dumps({
        "records": len(texts), "tokens": tokens, "seconds": seconds, "records_per_second": len(texts) / seconds,
        "tokens_per_second": tokens / seconds, "peak_rss_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
        "dtype": args.dtype, "device": "cpu", "batch": batch}))


if __name__ == "__main__":
    main()
