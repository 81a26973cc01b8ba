//! Rerankers that are language models: a prompt asks whether the document answers the query, and the score is the
//! probability of "yes" against "no" as the next token (arXiv:2506.05176, section 2).
//!
//! A checkpoint of sentence-transformers has a chat template for the roles `query` and `document`, and LogitScore in
//! modules.json. Without modules.json, the prompt is the one in the model card of Qwen3-Reranker.

use minijinja::syntax::SyntaxConfig;
use minijinja::value::Serde;
use minijinja::{Environment, context};
use serde_json::Value;

use super::architecture::Architecture;
use super::model::ModelError;
use super::sentence::LogitScore;
use super::tokenize::vocabulary::content;
use super::tokenize::{PairPrompt, Tokenizer};
use crate::model::store::Files;

/// What a language model is asked about a query and a document.
pub struct Question {
    /// Id of the token that says that the document answers the query.
    pub yes: u32,
    /// Id of the token that says the opposite; without one, the score is the logit of `yes` alone.
    pub no: Option<u32>,
    format: Format,
    /// The checkpoint's own instruction.
    instruction: Option<String>,
}

enum Format {
    ModelCard,
    ChatTemplate {
        source: String,
        /// A message's content is a list of parts instead of a text.
        structured: bool,
        /// Texts of special tokens, by the template's names for them.
        special: [(&'static str, String); 2],
    },
}

/// The model card's default, for web search.
const INSTRUCTION: &str = "Given a web search query, retrieve relevant passages that answer the query";

/// Stand for the query and the document while a template is rendered. Texts have no such characters.
const PLACES: [char; 2] = ['\u{f8f0}', '\u{f8f1}'];

/// Whether config.json says that the checkpoint is a language model.
pub(super) fn is_language_model(config: &Value) -> bool {
    config["architectures"][0].as_str().is_some_and(|name| name.ends_with("ForCausalLM"))
}

impl Question {
    /// # Errors
    /// The prompt is not known, or lacks what is needed.
    pub(super) fn read(
        files: &Files,
        architecture: &Architecture,
        tokenizer: &Tokenizer,
    ) -> Result<Self, ModelError> {
        let Some(LogitScore { yes, no, structured, instruction }) = LogitScore::read(files)? else {
            if architecture.name != "qwen3" {
                return Err(ModelError::Unsupported(format!(
                    "it is a language model of type {}, and nothing says how it ranks documents; supported: \
                     Qwen3-Reranker, and checkpoints of sentence-transformers with LogitScore in modules.json",
                    architecture.name
                )));
            }
            let id = |token: &str| {
                let missing = || ModelError::Unsupported(format!("its tokenizer has no token {token:?}"));
                tokenizer.token_id(token).ok_or_else(missing)
            };
            let (yes, no) = (id("yes")?, Some(id("no")?));
            return Ok(Self { yes, no, format: Format::ModelCard, instruction: None });
        };
        let config = files.json("tokenizer_config.json")?.unwrap_or_default();
        let source = match files.read("chat_template.jinja")? {
            Some(bytes) => String::from_utf8_lossy(&bytes).into_owned(),
            None => config["chat_template"].as_str().unwrap_or_default().to_owned(),
        };
        let special =
            ["bos_token", "eos_token"].map(|key| (key, content(&config[key]).unwrap_or_default().to_owned()));
        Ok(Self { yes, no, format: Format::ChatTemplate { source, structured, special }, instruction })
    }

    /// The prompt with an instruction, or else with the checkpoint's own, or else with that for web search.
    ///
    /// # Errors
    /// The chat template fails, or has no place for the query and the document.
    pub fn prompt(&self, instruction: Option<&str>, tokenizer: &Tokenizer) -> Result<PairPrompt, ModelError> {
        let instruction = instruction.or(self.instruction.as_deref());
        let text = match &self.format {
            Format::ModelCard => model_card(instruction.unwrap_or(INSTRUCTION)),
            Format::ChatTemplate { source, structured, special } => {
                render(source, *structured, special, instruction).map_err(|error| {
                    ModelError::Unsupported(format!("the chat template cannot be rendered: {error:#}"))
                })?
            }
        };
        let [query, document] = PLACES;
        let parts: Vec<&str> = text.split(PLACES).collect();
        match (parts.as_slice(), text.find(query) < text.find(document)) {
            ([before, between, after], true) => tokenizer.prompt(before, between, after),
            _ => Err(ModelError::Unsupported(
                "the chat template does not have the texts of the roles query and document once each, in this order"
                    .to_owned(),
            )),
        }
    }
}

/// The prompt in Qwen3-Reranker's model card.
fn model_card(instruction: &str) -> String {
    let [query, document] = PLACES;
    format!(
        "<|im_start|>system\nJudge whether the Document meets the requirements based on the Query and the Instruct \
         provided. Note that the answer can only be \"yes\" or \"no\".<|im_end|>\n<|im_start|>user\n<Instruct>: \
         {instruction}\n<Query>: {query}\n<Document>: {document}<|im_end|>\n<|im_start|>assistant\n<think>\n\n</think>\n\n"
    )
}

/// Renders a chat template as transformers does. The instruction is the system's message.
fn render(
    source: &str,
    structured: bool,
    special: &[(&'static str, String)],
    instruction: Option<&str>,
) -> Result<String, minijinja::Error> {
    let mut environment = Environment::new();
    environment.set_syntax(SyntaxConfig::builder().trim_blocks(true).lstrip_blocks(true).build()?);
    for (name, text) in special {
        environment.add_global(*name, text.clone());
    }
    let content = |text: String| match structured {
        true => serde_json::json!([{ "type": "text", "text": text }]),
        false => text.into(),
    };
    let message = |role: &str, text: String| serde_json::json!({ "role": role, "content": content(text) });
    let system = instruction.map(|text| message("system", text.to_owned()));
    let pair = ["query", "document"].into_iter().zip(PLACES);
    let pair = pair.map(|(role, place)| message(role, place.to_string()));
    let messages: Vec<Value> = system.into_iter().chain(pair).collect();
    let messages = minijinja::Value::from(Serde(messages));
    environment.render_str(source, context! { messages, add_generation_prompt => false })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn chat_templates_render_as_in_transformers() {
        let rendered = |source: &str, structured, instruction| {
            let special = [("eos_token", "</s>".to_owned())];
            render(source, structured, &special, instruction).unwrap().replace(PLACES, "?")
        };
        let flat = "{% for message in messages %}\n  {% if message.role != 'x' %}\n{{ message['role'] }}: {{ message.content }}\n\
                    {% endif %}\n{% endfor %}{{ eos_token }}\n";
        assert_eq!(rendered(flat, false, Some("Find")), "system: Find\nquery: ?\ndocument: ?\n</s>");
        let first = "{{ messages | selectattr('role', 'eq', 'system') | map(attribute='content') | first | default('web') }}";
        assert_eq!(rendered(first, false, Some("Find")), "Find");
        assert_eq!(rendered(first, false, None), "web");
        let parts = "{{ (messages | selectattr('role', 'eq', 'query') | first).content[0].text }}";
        assert_eq!(rendered(parts, true, None), "?");
    }
}
