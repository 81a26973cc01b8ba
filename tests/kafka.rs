//! The tests on a real Kafka. One program, so that its tests share a broker and wait side by side.

mod support;

mod acl;
mod admin;
mod chaos;
mod cli;
mod compare;
mod compose;
mod delivery;
mod drain;
mod estimates;
mod forecast;
mod grafana;
mod images;
mod input;
mod login;
mod readme;
mod rebalance;
mod refresh;
mod refused;
mod registry;
mod replay;
mod run;
mod schedule;
mod schemas_out;
mod shadow;
mod tasks;
mod tensor;
mod traces;
mod watch;
