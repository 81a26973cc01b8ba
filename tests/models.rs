//! docs/models.md: which tasks run with which architectures, devices and precisions, each with the test that shows it.
//! `make generated` writes the file.

use std::collections::BTreeSet;
use std::path::{Path, PathBuf};

use kandle::model::text::architecture::Architecture;
use kandle::task::{Family, KINDS};

/// A test: its file in `tests/`, its name.
type Test = (&'static str, &'static str);

const LOGITS: Test = ("golden.rs", "tokens_and_logits_equal_those_of_transformers");
const OLD_CONFIG: Test = ("golden.rs", "a_config_json_of_transformers_4_gives_the_same_model");
const VECTORS: Test = ("golden.rs", "embeddings_for_every_pooling");
const TOWERS: Test = ("towers.rs", "vectors_of_texts_equal_those_of_transformers");
const DECODER_VECTORS: Test = ("golden.rs", "vectors_of_decoders_equal_those_of_sentence_transformers");
const PRECISIONS: Test = ("golden.rs", "lower_precisions_stay_close_to_f32");
const ENTITIES: Test = ("tasks.rs", "entities_equal_those_of_transformers");
const PAIRS: Test = ("tasks.rs", "document_scores_equal_those_of_cross_encoders");
const ANSWERS: Test = ("tasks.rs", "document_scores_equal_those_of_language_models");
const ZERO_SHOT: Test = ("tasks.rs", "zero_shot_scores_equal_those_of_transformers");
const LABELLED: Test = ("gliner.rs", "entities_equal_those_of_the_package");
const SPARSE: Test = ("sparse.rs", "vectors_equal_those_of_sentence_transformers");
const CANDIDATES: Test = ("embeddings.rs", "candidates_have_a_prompt_of_their_own");

/// Task, config.json's `model_type`, what it is called, a folder of tests/fixtures, the test that runs it on a CPU in
/// f32, and a checkpoint of the hub. To add a task or an architecture, add a line.
type Row = (&'static str, &'static str, &'static str, &'static str, Test, &'static str);

#[rustfmt::skip]
const ROWS: &[Row] = &[
    ("text-classification", "albert", "ALBERT", "albert", LOGITS, "textattack/albert-base-v2-SST-2"),
    ("text-classification", "bert", "BERT", "bert", LOGITS, "nlptown/bert-base-multilingual-uncased-sentiment"),
    ("text-classification", "bert", "JinaBERT v2", "jina", LOGITS, "jinaai/jina-embeddings-v2-base-en"),
    ("text-classification", "camembert", "CamemBERT", "camembert", LOGITS, "cmarkea/distilcamembert-base-sentiment"),
    ("text-classification", "deberta-v2", "DeBERTa v2", "deberta-v2", LOGITS, "microsoft/deberta-v2-xlarge-mnli"),
    ("text-classification", "deberta-v2", "DeBERTa v3", "deberta-v3", LOGITS, "protectai/deberta-v3-base-prompt-injection-v2"),
    ("text-classification", "distilbert", "DistilBERT", "distilbert", LOGITS, "distilbert/distilbert-base-uncased-finetuned-sst-2-english"),
    ("text-classification", "electra", "ELECTRA", "electra", LOGITS, "google/electra-base-discriminator"),
    ("text-classification", "gemma3_text", "Gemma 3", "gemma3_text", LOGITS, "google/gemma-3-270m"),
    ("text-classification", "gte", "GTE (transformers 5)", "gte", LOGITS, "Alibaba-NLP/gte-multilingual-base"),
    ("text-classification", "modernbert", "ModernBERT", "modernbert", LOGITS, "answerdotai/ModernBERT-base"),
    ("text-classification", "mpnet", "MPNet", "mpnet", LOGITS, "microsoft/mpnet-base"),
    ("text-classification", "new", "GTE", "gte", OLD_CONFIG, "Alibaba-NLP/gte-multilingual-base"),
    ("text-classification", "nomic_bert", "Nomic BERT", "nomic_bert", LOGITS, "nomic-ai/nomic-embed-text-v1.5"),
    ("text-classification", "qwen3", "Qwen3", "qwen3", LOGITS, "Qwen/Qwen3-0.6B"),
    ("text-classification", "roberta", "RoBERTa", "roberta", LOGITS, "cardiffnlp/twitter-roberta-base-sentiment-latest"),
    ("text-classification", "xlm-roberta", "XLM-RoBERTa", "xlm-roberta", LOGITS, "papluca/xlm-roberta-base-language-detection"),
    ("token-classification", "albert", "ALBERT", "tokens-albert", ENTITIES, "albert/albert-base-v2"),
    ("token-classification", "bert", "BERT", "tokens-bert", ENTITIES, "dslim/bert-base-NER"),
    ("token-classification", "deberta-v2", "DeBERTa v3", "tokens-deberta", ENTITIES, "iiiorg/piiranha-v1-detect-personal-information"),
    ("token-classification", "deberta-v2", "GLiNER on DeBERTa v3", "gliner-deberta", LABELLED, "urchade/gliner_medium-v2.1"),
    ("token-classification", "electra", "ELECTRA", "tokens-electra", ENTITIES, "google/electra-base-discriminator"),
    ("token-classification", "modernbert", "ModernBERT", "tokens-modernbert", ENTITIES, "answerdotai/ModernBERT-base"),
    ("token-classification", "mpnet", "MPNet", "tokens-mpnet", ENTITIES, "microsoft/mpnet-base"),
    ("token-classification", "roberta", "RoBERTa", "tokens-roberta", ENTITIES, "Jean-Baptiste/roberta-large-ner-english"),
    ("token-classification", "xlm-roberta", "XLM-RoBERTa", "tokens-xlm-roberta", ENTITIES, "FacebookAI/xlm-roberta-large-finetuned-conll03-english"),
    ("zero-shot-classification", "bert", "BERT", "nli-bert", ZERO_SHOT, "MoritzLaurer/xtremedistil-l6-h256-zeroshot-v1.1-all-33"),
    ("zero-shot-classification", "deberta-v2", "DeBERTa v3", "nli-deberta", ZERO_SHOT, "MoritzLaurer/deberta-v3-base-zeroshot-v2.0"),
    ("zero-shot-classification", "xlm-roberta", "XLM-RoBERTa", "nli-xlm-roberta", ZERO_SHOT, "joeddav/xlm-roberta-large-xnli"),
    ("reranking", "bert", "BERT", "pairs-bert", PAIRS, "cross-encoder/ms-marco-MiniLM-L6-v2"),
    ("reranking", "deberta-v2", "DeBERTa v3", "pairs-deberta", PAIRS, "mixedbread-ai/mxbai-rerank-base-v1"),
    ("reranking", "qwen3", "Qwen3, a classifier", "pairs-qwen3", PAIRS, "tomaarsen/Qwen3-Reranker-0.6B-seq-cls"),
    ("reranking", "qwen3", "Qwen3, a language model", "rerank-qwen3", ANSWERS, "Qwen/Qwen3-Reranker-0.6B"),
    ("reranking", "roberta", "RoBERTa", "pairs-roberta", PAIRS, "cross-encoder/stsb-roberta-base"),
    ("text-embedding", "albert", "ALBERT", "albert", VECTORS, "sentence-transformers/paraphrase-albert-small-v2"),
    ("text-embedding", "bert", "BERT", "bert", VECTORS, "sentence-transformers/all-MiniLM-L6-v2"),
    ("text-embedding", "bert", "JinaBERT v2", "jina", VECTORS, "jinaai/jina-embeddings-v2-base-en"),
    ("text-embedding", "camembert", "CamemBERT", "camembert", VECTORS, "dangvantuan/sentence-camembert-base"),
    ("text-embedding", "clip", "CLIP", "image-clip-both", TOWERS, "openai/clip-vit-base-patch32"),
    ("text-embedding", "clip_text_model", "CLIP, the tower of texts", "clip-text", TOWERS, "openai/clip-vit-large-patch14"),
    ("text-embedding", "deberta-v2", "DeBERTa v2", "deberta-v2", VECTORS, "microsoft/deberta-v2-xlarge"),
    ("text-embedding", "deberta-v2", "DeBERTa v3", "deberta-v3", VECTORS, "microsoft/deberta-v3-base"),
    ("text-embedding", "distilbert", "DistilBERT", "distilbert", VECTORS, "sentence-transformers/multi-qa-distilbert-cos-v1"),
    ("text-embedding", "electra", "ELECTRA", "electra", VECTORS, "google/electra-base-discriminator"),
    ("text-embedding", "gemma3_text", "Gemma 3", "gemma3_text", VECTORS, "google/embeddinggemma-300m"),
    ("text-embedding", "gemma3_text", "Gemma 3, its own pooling", "embed-gemma3", DECODER_VECTORS, "google/embeddinggemma-300m"),
    ("text-embedding", "gte", "GTE", "gte", VECTORS, "Alibaba-NLP/gte-multilingual-base"),
    ("text-embedding", "modernbert", "ModernBERT", "modernbert", VECTORS, "Alibaba-NLP/gte-modernbert-base"),
    ("text-embedding", "mpnet", "MPNet", "mpnet", VECTORS, "sentence-transformers/all-mpnet-base-v2"),
    ("text-embedding", "nomic_bert", "Nomic BERT", "nomic_bert", VECTORS, "nomic-ai/nomic-embed-text-v1.5"),
    ("text-embedding", "qwen3", "Qwen3", "qwen3", VECTORS, "Qwen/Qwen3-Embedding-0.6B"),
    ("text-embedding", "qwen3", "Qwen3, its own pooling", "embed-qwen3", DECODER_VECTORS, "Qwen/Qwen3-Embedding-0.6B"),
    ("text-embedding", "roberta", "RoBERTa", "roberta", VECTORS, "sentence-transformers/all-distilroberta-v1"),
    ("text-embedding", "siglip", "SigLIP", "image-siglip-both", TOWERS, "google/siglip-base-patch16-224"),
    ("text-embedding", "siglip_text_model", "SigLIP, the tower of texts", "siglip-text", TOWERS, "google/siglip-base-patch16-224"),
    ("text-embedding", "xlm-roberta", "XLM-RoBERTa", "xlm-roberta", VECTORS, "intfloat/multilingual-e5-large"),
    ("sparse-embedding", "albert", "ALBERT", "sparse-albert", SPARSE, "albert/albert-base-v2"),
    ("sparse-embedding", "bert", "BERT", "sparse-bert", SPARSE, "naver/splade-cocondenser-ensembledistil"),
    ("sparse-embedding", "distilbert", "DistilBERT", "sparse-distilbert", SPARSE, "opensearch-project/opensearch-neural-sparse-encoding-v2-distill"),
    ("sparse-embedding", "electra", "ELECTRA", "sparse-electra", SPARSE, "google/electra-base-generator"),
    ("sparse-embedding", "modernbert", "ModernBERT", "sparse-modernbert", SPARSE, "answerdotai/ModernBERT-base"),
    ("sparse-embedding", "mpnet", "MPNet", "sparse-mpnet", SPARSE, "microsoft/mpnet-base"),
    ("sparse-embedding", "roberta", "RoBERTa", "sparse-roberta", SPARSE, "FacebookAI/roberta-base"),
    ("sparse-embedding", "xlm-roberta", "XLM-RoBERTa, lexical weights", "sparse-m3", SPARSE, "BAAI/bge-m3"),
    ("similarity", "bert", "BERT", "bert", CANDIDATES, "sentence-transformers/all-MiniLM-L6-v2"),
];

/// The fixtures whose golden tests have run on an NVIDIA GPU, in f32, bf16 and f16 (benches/RESULTS.md, "An H100").
/// Extend it after a run of scripts/gpu-check.sh.
const ON_CUDA: &[&str] = &["bert", "roberta", "xlm-roberta", "distilbert", "modernbert", "nomic_bert", "gte"];

fn root() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).to_owned()
}

fn read(path: &str) -> String {
    std::fs::read_to_string(root().join(path)).unwrap_or_else(|e| panic!("{path}: {e}"))
}

/// The cells of a row: CPU in f32, bf16 and int8, then CUDA in f32, bf16 and f16.
fn cells(&(task, _, _, fixture, test, _): &Row) -> [&'static str; 6] {
    let golden = test.0 == "golden.rs" && test != DECODER_VECTORS && test != OLD_CONFIG;
    // The test of lower precisions compares embeddings.
    let golden = golden || test == TOWERS;
    let lower = if golden && task == "text-embedding" { "yes" } else { "layers" };
    let cuda = golden && test != TOWERS && ON_CUDA.contains(&fixture);
    let on_cuda = |what| if cuda { what } else { "" };
    ["yes", lower, lower, on_cuda("yes"), on_cuda(lower), on_cuda(lower)]
}

/// The tasks that use a text model, in the order of the table of tasks.
fn tasks() -> impl Iterator<Item = &'static str> {
    KINDS.iter().filter(|kind| matches!(kind.family, Family::Text(_))).map(|kind| kind.kind.name())
}

fn tables() -> String {
    let mut text = String::new();
    for task in tasks() {
        text += &format!("\n## {task}\n\n");
        text += "| architecture | `model_type` | CPU: f32 | bf16 | int8 | CUDA: f32 | bf16 | f16 | test | a checkpoint |\n";
        text += "|---|---|---|---|---|---|---|---|---|---|\n";
        for row in ROWS.iter().filter(|row| row.0 == task) {
            let &(_, architecture, name, _, (file, test), checkpoint) = row;
            let cells = cells(row).join(" | ");
            text += &format!(
                "| {name} | `{architecture}` | {cells} | [{test}](../tests/{file}) | {checkpoint} |\n"
            );
        }
    }
    text
}

#[test]
fn the_table_of_models_is_the_one_of_the_tests() {
    let path = "docs/models.md";
    let document = read(path);
    let (head, rest) = document.split_once("\n## ").expect("tables");
    let tail = rest.split_once("\n## Precision").map_or("", |(_, tail)| tail);
    let wanted = format!("{head}{}\n## Precision{tail}", tables());
    if std::env::var_os("KANDLE_WRITE").is_some() {
        std::fs::write(root().join(path), wanted).expect("written");
    } else {
        assert!(document == wanted, "{path} is out of date: run `make generated`");
    }
}

#[test]
fn every_task_and_architecture_has_a_row_that_a_test_backs() {
    let (mut with_task, mut with_architecture) = (BTreeSet::new(), BTreeSet::new());
    let known: BTreeSet<&str> = Architecture::names().collect();
    for &(task, architecture, _, fixture, (file, test), checkpoint) in ROWS {
        assert!(tasks().any(|known| known == task), "{task} is not a task with a model");
        assert!(known.contains(architecture), "{architecture} is not an architecture");
        let source = read(&format!("tests/{file}"));
        assert!(source.contains(&format!("#[test]\nfn {test}()")), "tests/{file} has no test {test}");
        assert!(
            source.contains(&format!("\"{fixture}\"")),
            "tests/{file} does not use the fixture {fixture}"
        );
        // A checkpoint of GLiNER has its own configuration, with that of its encoder in it.
        let file = if fixture.starts_with("gliner") { "gliner_config.json" } else { "config.json" };
        let config = read(&format!("tests/fixtures/{fixture}/{file}"));
        let old = root().join(format!("tests/fixtures/{fixture}/config.v4.json"));
        let old = std::fs::read_to_string(old).unwrap_or_default();
        let says = format!("\"model_type\": \"{architecture}\"");
        assert!(
            config.contains(&says) || old.contains(&says),
            "{fixture} is no model of type {architecture}"
        );
        assert_eq!(checkpoint.split('/').count(), 2, "{checkpoint}");
        with_task.insert(task);
        with_architecture.insert(architecture);
    }
    for task in tasks() {
        assert!(with_task.contains(task), "add a row for the task {task} to ROWS");
    }
    for name in known {
        assert!(with_architecture.contains(name), "add a row for the architecture {name} to ROWS");
    }
    let (file, test) = PRECISIONS;
    assert!(read(&format!("tests/{file}")).contains(&format!("fn {test}()")));
    assert!(read("docs/models.md").contains(test));
}
