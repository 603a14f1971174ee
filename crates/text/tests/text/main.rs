//! Tokenizers, detokenizers and templates against what the reference implementations make of the same input.
//! `golden/make_golden.py` wrote the expectations.

mod chats;
mod hostile;
mod models;
mod stream;
mod templates;
mod tokens;
mod tools;
