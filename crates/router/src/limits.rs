//! Limits that only the router needs; the ones it shares are in `galerne_types::limits`.

use std::time::Duration;

use galerne_types::limits::GRAMMAR_BYTES_MAX;

/// What requests may take of a router; each is a flag.
#[derive(Clone, Debug)]
pub struct RequestLimits {
    /// Requests that this router works on at once; beyond it they are refused until one has ended.
    pub requests_max: usize,
    /// Bytes of bodies that are being read at once, over all connections of both faces, and of what their JSON becomes.
    pub bodies_bytes_max: usize,
    /// Prompts of one request.
    pub prompts_max: usize,
    /// Answers to one request: `n` or `best_of`, times its prompts.
    pub choices_max: u32,
    /// Tokens of one prompt; the context of a model may be less.
    pub prompt_tokens_max: u32,
    /// Tokens of one answer; the context of a model may be less.
    pub answer_tokens_max: u32,
    /// Stop strings of one request.
    pub stop_strings_max: usize,
    /// Bytes of one stop string.
    pub stop_string_bytes_max: usize,
    /// Bytes of one request's grammar: schema, regular expression, choices or rules. Leaders take no more than
    /// [`GRAMMAR_BYTES_MAX`].
    pub grammar_bytes_max: usize,
    /// Messages of one conversation.
    pub messages_max: usize,
    /// Tools of one conversation.
    pub tools_max: usize,
    /// Time for the first token: it covers the leader's waiting queue, and every group that is tried.
    pub first_token_s_max: Duration,
    /// Time between two tokens: it covers a request that the leader preempts for want of KV blocks.
    pub next_token_s_max: Duration,
    /// Time that a new request waits for a group where none serves its model: while the only one forms anew, or the first one
    /// is started for it.
    pub hold_s_max: Duration,
    /// Time that an answer whose group was lost waits for one that goes on with it, each time that one is lost.
    pub recovery_s_max: Duration,
}

impl RequestLimits {
    /// The limits that hold unless flags say otherwise.
    pub const DEFAULT: Self = Self {
        requests_max: 16_384,
        bodies_bytes_max: 256 << 20,
        prompts_max: 128,
        choices_max: 128,
        prompt_tokens_max: 1 << 20,
        answer_tokens_max: 1 << 20,
        stop_strings_max: 16,
        stop_string_bytes_max: 1 << 10,
        grammar_bytes_max: GRAMMAR_BYTES_MAX,
        messages_max: 4_096,
        tools_max: 128,
        first_token_s_max: Duration::from_secs(600),
        next_token_s_max: Duration::from_secs(120),
        hold_s_max: Duration::from_secs(5),
        recovery_s_max: Duration::from_secs(60),
    };
}

impl Default for RequestLimits {
    fn default() -> Self {
        Self::DEFAULT
    }
}

/// Groups that are tried for one request before a leader has had it.
pub(crate) const ATTEMPTS_MAX: usize = 3;

/// The most that an answer whose group was lost waits before it is sent to one for the first time: all answers of a group
/// are lost at once. Each further wait is up to twice as long.
pub(crate) const RETRY_MS_MIN: Duration = Duration::from_millis(20);

/// The longest such wait.
pub(crate) const RETRY_MS_MAX: Duration = Duration::from_millis(1_000);

/// Named requests that are under way at once.
pub(crate) const REPEATS_MAX: usize = 65_536;

/// Names of requests that begin elsewhere which a leader has not read yet; more of them it is not told.
pub(crate) const SUPERSEDED_UNREAD_MAX: usize = 4_096;

/// Requests on which groups were lost that the other routers are still to be told of; more of them only this one refuses.
pub(crate) const BANS_UNTOLD_MAX: usize = 64;

/// Bytes of a request's name, `Idempotency-Key` or `X-Request-Id`; a longer one is none.
pub(crate) const REPEAT_KEY_BYTES_MAX: usize = 256;

/// Time to connect to a leader.
pub(crate) const CONNECT_MS_MAX: Duration = Duration::from_millis(1_000);

/// Time between two pings on a leader's connection, streams running or not.
pub(crate) const PING_MS: Duration = Duration::from_millis(300);

/// Time that a leader has to answer a ping: with the pings, a leader that hangs is noticed within a second.
pub(crate) const PONG_MS_MAX: Duration = Duration::from_millis(700);

/// Time between two tries to reach a leader that was lost while the fleet still believes in it.
pub(crate) const PROBE_MS: Duration = Duration::from_millis(500);

/// Time between two tries to hear a leader's reports of its load.
pub(crate) const LOAD_RETRY_MS: Duration = Duration::from_millis(1_000);

/// Time between two accounts of what this router counts, in which something has changed.
pub(crate) const TELL_S_MAX: Duration = Duration::from_secs(2);

/// The same when requests find nobody who serves: somebody may start a group for them.
pub(crate) const TELL_MS_MIN: Duration = Duration::from_millis(200);

/// Time that the fleet view has to move after a leader refused the epoch that it shows.
pub(crate) const FLEET_MOVE_MS_MAX: Duration = Duration::from_millis(2_000);

/// Bytes of text that are turned into tokens on the thread that serves the connection: to hand them to another one
/// would cost more.
pub(crate) const INLINE_TEXT_BYTES_MAX: usize = 8 << 10;

/// Time between two writes to a stream, for each token in the first of them: tokens that come faster are written together,
/// and the faster they come, the more of them. A write costs as much as many tokens. The last one does not wait.
pub(crate) const WRITE_PAUSE_PER_TOKEN_MS: Duration = Duration::from_millis(2);

/// The most time between two writes to a stream for which there is something to write.
pub(crate) const WRITE_PAUSE_MS_MAX: Duration = Duration::from_millis(8);

/// Bytes of events that are gathered for one write while more are ready.
pub(crate) const WRITE_BYTES_MAX: usize = 32 << 10;

/// Time for the last errors to reach their clients after the grace of a shutdown is over.
pub(crate) const FLUSH_MS_MAX: Duration = Duration::from_millis(500);

/// Bytes that a leader may send ahead on a connection: nobody who reads it waits for a client.
pub(crate) const LINK_WINDOW_BYTES: u32 = 4 << 20;

/// Events of an answer that nobody streams which are gathered before it is looked at.
pub(crate) const HELD_EVENTS_MAX: usize = 128;

/// Seconds after which a refused client may try again.
pub(crate) const RETRY_AFTER_S: u32 = 1;

/// Levels of arrays and objects in each other in a JSON text: what its parser takes.
pub(crate) const JSON_LEVELS_MAX: usize = 127;

/// Characters of a name that a client sent which an error repeats.
pub(crate) const ECHO_CHARS_MAX: usize = 100;

/// Tokens that an answer is taken for in its tenant's quota when its client has not said how long it may become; what
/// it has really taken is counted at its end.
pub(crate) const ANSWER_TOKENS_EXPECTED: u32 = 256;
