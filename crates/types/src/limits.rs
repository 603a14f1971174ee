//! Every limit of Galerne that is not a flag, in one place, with its unit last in the name.

/// Tokens in one KV block, which is also one piece of attention (see `model`): part of the numerics.
pub const KV_BLOCK_TOKENS: usize = 32;

/// Ranks in one group.
pub const WORLD_SIZE_MAX: usize = 16;

/// Ended epochs that a group remembers.
pub const PAST_EPOCHS_MAX: usize = 16;

/// Virtual shards of one model (= KV heads, padded up).
pub const VIRTUAL_SHARDS_MAX: usize = 128;

/// Alternatives reported beside each sampled token.
pub const TOP_LOGPROBS_MAX: u32 = 20;

/// Stop token ids of one request, the model's own end tokens included.
pub const STOP_TOKENS_MAX: usize = 64;

/// Entries of one request's logit bias.
pub const LOGIT_BIAS_MAX: usize = 1024;

/// Bytes of one request's grammar: schema, regular expression, choices or rules.
pub const GRAMMAR_BYTES_MAX: usize = 256 << 10;

/// Bytes of one HTTP request body.
pub const HTTP_BODY_BYTES_MAX: usize = 4 << 20;

/// Bytes of one decoded gRPC message between routers, leaders and ranks.
pub const GRPC_MESSAGE_BYTES_MAX: usize = 16 << 20;

/// Requests that wait at one leader before it refuses more, unless a flag says otherwise.
pub const WAITING_REQUESTS_MAX: u32 = 1024;

/// Events that wait for one slow reader before its stream is ended with an error: minutes of a fast model.
pub const STREAM_EVENTS_MAX: usize = 16_384;

/// Traced requests that one step names: the span of a step is linked to so many.
pub const STEP_TRACES_MAX: usize = 8;

/// Bytes of a W3C `traceparent` of version 00.
pub const TRACEPARENT_BYTES: usize = 55;

/// Steps that may be under way at the ranks at once: one runs while the next is planned and sent.
pub const STEPS_IN_FLIGHT_MAX: usize = 2;

/// Tokens of one draft: of an answer, what is run ahead of being drawn.
pub const DRAFT_TOKENS_MAX: usize = 15;

/// Bytes of a model's header (safetensors JSON or GGUF metadata) before it is refused.
pub const MODEL_HEADER_BYTES_MAX: u64 = 256 << 20;
