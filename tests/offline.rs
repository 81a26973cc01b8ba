//! The tests that need no Kafka: configuration, schemas, models, documents and the chart.

mod support;

mod chart;
mod config;
mod drift;
mod embeddings;
mod gliner;
mod models;
mod schemas;
mod series;
mod sparse;
mod towers;
