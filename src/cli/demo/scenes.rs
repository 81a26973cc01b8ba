//! What a demo shows: records, the model that reads them, and a broken record.

use serde_json::Value;

pub struct Scene {
    /// The records, in the plural; also the name of their topic.
    pub name: &'static str,
    pub title: &'static str,
    /// One JSON object a line.
    pub records: &'static str,
    /// Settings that any Kafka needs for these records.
    pub set: &'static [&'static str],
    /// `output.include`.
    pub include: &'static str,
    /// What a bug in a producer makes of a record.
    pub broken: fn(&str) -> String,
    /// What is said of a record beside its prediction, which has the included members.
    pub about: fn(&Value) -> String,
}

impl Scene {
    pub fn input(&self) -> String {
        self.name.to_owned()
    }

    pub fn output(&self) -> String {
        format!("{}-predictions", self.name)
    }

    pub fn dead_letters(&self) -> String {
        format!("{}-dead", self.name)
    }
}

/// Records by demo/train.py, from templates that the model was not trained on.
pub const TICKETS: Scene = Scene {
    name: "tickets",
    title: "support tickets from a Kafka topic, routed to a team by a small BERT, back to Kafka",
    records: include_str!("../../../demo/tickets.jsonl"),
    set: &["input.field=/text", "task.kind=text-classification", "model.source=bundled"],
    include: "/id,/text",
    broken: |record| record[..record.len() / 2].to_owned(),
    about: |prediction| prediction["text"].as_str().unwrap_or_default().to_owned(),
};

/// Records by demo/train_table.py.
pub const TABLE: Scene = Scene {
    name: "customers",
    title: "customers from a Kafka topic; a random forest says who leaves; back to Kafka",
    records: include_str!("../../../demo/customers.jsonl"),
    set: &[
        "task.kind=tensor",
        "task.as=classification",
        "task.inputs.plan=/plan",
        "task.inputs.contract=/contract",
        "task.inputs.months=/months",
        "task.inputs.charge=/charge",
        "task.inputs.tickets=/tickets",
        "task.inputs.late_payments=/late_payments",
        "task.inputs.use_change=/use_change",
        "model.source=bundled:churn",
    ],
    include: "/id,/plan,/contract,/months,/outcome",
    broken: |record| record.replacen("\"months\": ", "\"months\": \"since \", \"since\": ", 1),
    about: |prediction| {
        let text = |name: &str| prediction[name].as_str().unwrap_or_default().to_owned();
        format!(
            "{}: {}, {}, for {} months (in truth: {})",
            text("id"),
            text("plan"),
            text("contract"),
            prediction["months"],
            text("outcome")
        )
    },
};

/// Records by demo/train_images.py: JPEGs and PNGs in base64.
pub const IMAGES: Scene = Scene {
    name: "images",
    title: "images from a Kafka topic, named by a small ResNet, back to Kafka",
    records: include_str!("../../../demo/images.jsonl"),
    set: &["input.field=/image", "task.kind=image-classification", "model.source=bundled:shapes"],
    include: "/id,/drawn",
    broken: |record| match record.find("\"image\": \"") {
        Some(at) => {
            let image = &record[at + 10..record.len() - 2];
            // A multiple of four characters is base64 of the file's first half.
            format!("{}{}\"}}", &record[..at + 10], &image[..image.len() / 8 * 4])
        }
        None => record.to_owned(),
    },
    about: |prediction| {
        let text = |name: &str| prediction[name].as_str().unwrap_or_default().to_owned();
        format!("{} (drawn: {})", text("id"), text("drawn"))
    },
};
