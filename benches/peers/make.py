#!/usr/bin/env python3
"""Makes the models and texts that the engine's benchmark runs over.

    python3 benches/peers/make.py FOLDER [MODEL…]

Random weights in the shapes of all-MiniLM-L6-v2 (`minilm`), BERT-base (`base`) and BERT-large (`large`): the cost of
a forward does not depend on the weights. `modernbert` has six layers of ModernBERT-base, for scripts/gpu-check.sh: RoPE,
and in some layers a sliding window of 64 tokens to each side. `qwen3` has four layers of Qwen3-Embedding-0.6B, `gemma` six
of EmbeddingGemma-300m. `deberta` is DeBERTa v3 in the shape of `base`: the two differ by the terms of attention. `albert`, `electra`, `jina` and `mpnet` have
that shape too; `-tiny` after any of the five names is the shape of `minilm`, for benches/encoders.sh. `pairs` is a
cross-encoder in the shape of ms-marco-MiniLM-L6-v2. Without MODEL: `minilm`, `base`, `modernbert` and `pairs`.
The vocabulary (WordPiece) has 30,522 made-up words and word parts. Texts use the words with the frequencies of a language
(Zipf's law); one word in twenty has several pieces. Lengths in tokens, special ones included:

    short.jsonl  2,000 texts of 33 tokens, 25 to 41
    mixed.jsonl  2,000 texts of 33 tokens on average, 3 to 228 (log-normal): what inboxes look like
    long.jsonl     300 texts of 250 tokens, 150 to 350
    equal.jsonl  2,000 texts of 33 tokens each
"""

import bisect
import itertools
import json
import pathlib
import random
import sys

import torch
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors
from transformers import (
    AlbertConfig, AlbertModel, BertConfig, BertForSequenceClassification, BertModel, DebertaV2Config, DebertaV2Model,
    ElectraConfig, ElectraModel, Gemma3TextConfig, Gemma3TextModel, ModernBertConfig, ModernBertModel, MPNetConfig,
    MPNetModel, PreTrainedTokenizerFast, Qwen3Config, Qwen3Model)

# The fixtures' folder has the one implementation of JinaBERT.
sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[2] / "tests" / "fixtures"))
import jina

SHAPES = {
    "minilm": dict(hidden_size=384, num_hidden_layers=6, num_attention_heads=12, intermediate_size=1536),
    "base": dict(hidden_size=768, num_hidden_layers=12, num_attention_heads=12, intermediate_size=3072),
    "large": dict(hidden_size=1024, num_hidden_layers=24, num_attention_heads=16, intermediate_size=4096),
}
VOCABULARY = 30522
LIMIT = 512


def words(rng):
    """Made-up words, the frequent ones short."""
    parts = [c + v for c in "bcdfghjklmnprstvz" for v in ["a", "e", "i", "o", "u", "an", "er", "is"]]
    seen = {}
    while len(seen) < 24000:
        seen["".join(rng.choice(parts) for _ in range(rng.choice([1, 2, 2, 3, 3, 4])))] = True
    return sorted(seen, key=len), parts


def tokenizer(rng):
    whole, parts = words(rng)
    vocabulary = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"] + list("abcdefghijklmnopqrstuvwxyz")
    vocabulary += ["##" + c for c in "abcdefghijklmnopqrstuvwxyz"] + whole + ["##" + p for p in parts]
    vocabulary = list(dict.fromkeys(vocabulary))
    vocabulary += [f"[unused{i}]" for i in range(VOCABULARY - len(vocabulary))]
    tok = Tokenizer(models.WordPiece({w: i for i, w in enumerate(vocabulary)}, unk_token="[UNK]"))
    tok.normalizer = normalizers.BertNormalizer(lowercase=True)
    tok.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tok.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", pair="[CLS] $A [SEP] $B:1 [SEP]:1", special_tokens=[("[CLS]", 2), ("[SEP]", 3)])
    wrapped = PreTrainedTokenizerFast(
        tokenizer_object=tok, model_max_length=LIMIT, cls_token="[CLS]", sep_token="[SEP]", pad_token="[PAD]",
        unk_token="[UNK]", mask_token="[MASK]")
    # Zipf-Mandelbrot law.
    frequencies = list(itertools.accumulate(1 / (rank + 2.7) for rank in range(len(whole))))
    return wrapped, (whole, frequencies), parts


def text(rng, tok, whole, parts, tokens):
    """A text of exactly `tokens` tokens, the two special ones included; `whole`: words, their cumulative frequencies."""
    words, upto = whole
    out = []
    left = tokens - 2
    while left > 0:
        word = words[bisect.bisect(upto, rng.random() * upto[-1])]
        if left > 1 and rng.random() < 0.05:
            word += rng.choice(parts) + rng.choice("bcdfg")
        cost = len(tok.tokenize(word))
        if cost <= left:
            out.append(word)
            left -= cost
    return " ".join(out)


def main(folder, wanted):
    rng = random.Random(20261124)
    tok, whole, parts = tokenizer(rng)
    lengths = {
        "short": [rng.randint(25, 41) for _ in range(2000)],
        "mixed": [min(228, max(3, round(rng.lognormvariate(3.22, 0.75)))) for _ in range(2000)],
        "long": [rng.randint(150, 350) for _ in range(300)],
        "equal": [33] * 2000,
    }
    folder.mkdir(parents=True, exist_ok=True)
    for name, all_lengths in lengths.items():
        lines = [json.dumps({"text": text(rng, tok, whole, parts, n)}) for n in all_lengths]
        (folder / f"{name}.jsonl").write_text("\n".join(lines) + "\n")
        print(name, len(lines), "texts", sum(all_lengths) / len(all_lengths), "tokens on average", max(all_lengths), "at most")
    models = {name: (BertModel, BertConfig(vocab_size=VOCABULARY, max_position_embeddings=LIMIT, **shape))
              for name, shape in SHAPES.items()}
    models["modernbert"] = (ModernBertModel, ModernBertConfig(
        vocab_size=VOCABULARY, max_position_embeddings=LIMIT, num_hidden_layers=6, pad_token_id=0, bos_token_id=2,
        cls_token_id=2, eos_token_id=3, sep_token_id=3))
    models["qwen3"] = (Qwen3Model, Qwen3Config(
        vocab_size=VOCABULARY, max_position_embeddings=LIMIT, hidden_size=1024, num_hidden_layers=4, num_attention_heads=16,
        num_key_value_heads=8, head_dim=128, intermediate_size=3072, pad_token_id=0, bos_token_id=2, eos_token_id=3))
    models["gemma"] = (Gemma3TextModel, Gemma3TextConfig(
        vocab_size=VOCABULARY, max_position_embeddings=LIMIT, hidden_size=768, num_hidden_layers=6, num_attention_heads=3,
        num_key_value_heads=1, head_dim=256, intermediate_size=1152, use_bidirectional_attention=True, pad_token_id=0,
        bos_token_id=2, eos_token_id=3))
    for suffix, shape in {"": SHAPES["base"], "-tiny": SHAPES["minilm"]}.items():
        shape = dict(vocab_size=VOCABULARY, **shape)
        models["albert" + suffix] = (AlbertModel, AlbertConfig(
            max_position_embeddings=LIMIT, embedding_size=128, hidden_act="gelu_new", pad_token_id=0, bos_token_id=2,
            eos_token_id=3, **shape))
        models["deberta" + suffix] = (DebertaV2Model, DebertaV2Config(
            max_position_embeddings=LIMIT, relative_attention=True, position_buckets=256, norm_rel_ebd="layer_norm",
            share_att_key=True, pos_att_type=["p2c", "c2p"], position_biased_input=False, type_vocab_size=0, **shape))
        models["electra" + suffix] = (ElectraModel, ElectraConfig(
            max_position_embeddings=LIMIT, embedding_size=shape["hidden_size"], **shape))
        models["jina" + suffix] = (jina.Jina, jina.configuration(max_position_embeddings=LIMIT, **shape))
        # Positions begin behind the padding token's.
        models["mpnet" + suffix] = (MPNetModel, MPNetConfig(
            max_position_embeddings=LIMIT + 2, pad_token_id=0, bos_token_id=2, eos_token_id=3, **shape))
    models["pairs"] = (BertForSequenceClassification, BertConfig(
        vocab_size=VOCABULARY, max_position_embeddings=LIMIT, num_labels=1, **SHAPES["minilm"]))
    for name in wanted or ["minilm", "base", "modernbert", "pairs"]:
        kind, config = models[name]
        torch.manual_seed(7)
        model = kind(config).eval()
        out = folder / name
        model.save_pretrained(out)
        tok.save_pretrained(out)
        if name == "pairs":
            continue
        (out / "modules.json").write_text(json.dumps([
            {"idx": 0, "name": "0", "path": "", "type": "sentence_transformers.models.Transformer"},
            {"idx": 1, "name": "1", "path": "1_Pooling", "type": "sentence_transformers.models.Pooling"},
            {"idx": 2, "name": "2", "path": "2_Normalize", "type": "sentence_transformers.models.Normalize"}]))
        hidden_size = json.loads((out / "config.json").read_text())["hidden_size"]
        (out / "1_Pooling").mkdir(exist_ok=True)
        (out / "2_Normalize").mkdir(exist_ok=True)
        (out / "1_Pooling" / "config.json").write_text(json.dumps(
            {"word_embedding_dimension": hidden_size,
             "pooling_mode_lasttoken" if name == "qwen3" else "pooling_mode_mean_tokens": True}))
        (out / "sentence_bert_config.json").write_text(json.dumps({"max_seq_length": LIMIT, "do_lower_case": False}))
        print(name, sum(p.numel() for p in model.parameters()), "parameters")


if __name__ == "__main__":
    main(pathlib.Path(sys.argv[1]), sys.argv[2:])
