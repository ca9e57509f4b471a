//! Proofs about the model, training and the engine on the CPU device: against transformers and
//! PEFT, against finite differences, and of one part not disturbing another. One binary, so that
//! it is linked once.

#![allow(clippy::unwrap_used)]

mod cold_loads;
mod common;
mod engine_adapters;
mod engine_graphs;
mod engine_jobs;
mod engine_leaving;
mod engine_requests;
mod engine_resume;
mod engine_storm;
mod finite_differences;
mod isolation;
mod lora_golden;
mod memory;
mod model_golden;
mod registry;
mod whole_model;
