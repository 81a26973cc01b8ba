#!/usr/bin/env python3
"""kandle's GLiNER against the gliner package: records per second on two threads, on texts of mixed lengths.

    pip install torch transformers gliner
    python3 benches/peers/entities.py KANDLE [DIRECTORY]

The checkpoint has random weights in the shape of gliner_small-v2.1 (DeBERTa-v3-small's layers, with a smaller
vocabulary). The package gets the texts sorted by length, so that it pads least, and its best batch size; its time does
not include loading the model. That of kandle is `kandle predict` of all texts minus that of one. Turns alternate.
"""

import json
import os
import pathlib
import random
import resource
import statistics
import subprocess
import sys
import tempfile
import time

import torch
from gliner import GLiNER
from tokenizers import Tokenizer, models, pre_tokenizers, processors, trainers
from transformers import DebertaV2Config, PreTrainedTokenizerFast

THREADS, TEXTS, TURNS, BATCHES = 2, 80, 3, (4, 8)
# Random weights score most spans about 0.5, and choosing among thousands of entities would be most of the work.
THRESHOLD = 0.9
LABELS = ["person", "organization", "phone number", "email address", "date of birth", "location"]


def texts(rng):
    """Words of syllables, by Zipf's law; from 5 to 300 of them, evenly by the logarithm."""
    syllables = [a + b for a in "bdfgklmnprstvz" for b in ("a", "e", "i", "o", "u", "an", "er", "is")]
    words = ["".join(rng.choices(syllables, k=rng.randint(1, 4))) for _ in range(8000)]
    weights = [1 / (i + 5) for i in range(len(words))]
    length = lambda: round(5 * 60 ** rng.random())
    return [" ".join(rng.choices(words, weights, k=length())).capitalize() + "." for _ in range(TEXTS)]


def checkpoint(corpus, folder):
    tok = Tokenizer(models.Unigram())
    tok.pre_tokenizer = pre_tokenizers.Metaspace()
    tok.train_from_iterator(corpus, trainers.UnigramTrainer(
        vocab_size=4000, special_tokens=["[PAD]", "[CLS]", "[SEP]", "[UNK]", "[MASK]"], unk_token="[UNK]", show_progress=False))
    tok.post_processor = processors.TemplateProcessing(single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 1), ("[SEP]", 2)])
    tok = PreTrainedTokenizerFast(tokenizer_object=tok, cls_token="[CLS]", sep_token="[SEP]", pad_token="[PAD]",
                                  unk_token="[UNK]", mask_token="[MASK]")
    tok.add_tokens(["[FLERT]", "<<ENT>>", "<<SEP>>"], special_tokens=True)
    backbone = DebertaV2Config(
        vocab_size=len(tok), hidden_size=768, num_hidden_layers=6, num_attention_heads=12, intermediate_size=3072,
        max_position_embeddings=512, type_vocab_size=0, relative_attention=True, position_buckets=256,
        norm_rel_ebd="layer_norm", share_att_key=True, pos_att_type=["p2c", "c2p"], position_biased_input=False)
    with tempfile.TemporaryDirectory() as source:
        tok.save_pretrained(source)
        backbone.save_pretrained(source)
        model = GLiNER.from_config({"model_name": source, "hidden_size": 512, "max_width": 12, "max_len": 384,
                                    "span_mode": "markerV0", "encoder_config": backbone.to_dict()}, backbone_from_pretrained=False)
    model.config.model_name = "random"
    model.save_pretrained(folder, safe_serialization=True)
    return model.eval()


def main():
    folder = pathlib.Path(sys.argv[2] if len(sys.argv) > 2 else tempfile.mkdtemp())
    all_texts = texts(random.Random(7))
    torch.manual_seed(7)
    torch.set_num_threads(THREADS)
    model = checkpoint(all_texts, folder / "model")
    by_length = sorted(all_texts, key=len)
    (folder / "all.txt").write_text("".join(text + "\n" for text in all_texts))
    (folder / "one.txt").write_text("x\n")
    (folder / "kandle.json").write_text(json.dumps({
        "kafka": {"brokers": "none:1"}, "input": {"topics": ["in"], "group": "g", "format": "text"},
        "task": {"kind": "token-classification", "labels": LABELS, "threshold": THRESHOLD}, "model": {"source": str(folder / "model"), "device": "cpu"},
        "batch": {"lanes": THREADS}, "output": {"topic": "out"}, "dead_letters": {"topic": "dead"}, "log": {"level": "warn"}}))

    def package(batch):
        started, cpu = time.time(), time.process_time()
        model.inference(by_length, LABELS, batch_size=batch, threshold=THRESHOLD)
        return time.time() - started, time.process_time() - cpu

    def kandle(file):
        environment = {**os.environ, "RAYON_NUM_THREADS": str(THREADS)}
        used = lambda: sum(resource.getrusage(resource.RUSAGE_CHILDREN)[:2])
        started, cpu = time.time(), used()
        subprocess.run([sys.argv[1], "predict", "--strict", "-c", folder / "kandle.json", folder / file], check=True,
                       stdout=subprocess.DEVNULL, env=environment)
        return time.time() - started, used() - cpu

    package(BATCHES[0])
    ratios = {"elapsed": [], "processor": []}
    for turn in range(TURNS):
        theirs = min(package(batch) for batch in BATCHES)
        every, one = kandle("all.txt"), kandle("one.txt")
        ours = [a - b for a, b in zip(every, one)]
        for what, a, b in zip(ratios, theirs, ours):
            ratios[what].append(a / b)
            print(f"turn {turn + 1}, {what}: gliner {TEXTS / a:.1f}, kandle {TEXTS / b:.1f} records/s, ratio {a / b:.2f}", flush=True)
    for what, of in ratios.items():
        print(f"{what}: median ratio {statistics.median(of):.2f}")


if __name__ == "__main__":
    main()
