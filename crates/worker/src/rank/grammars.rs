//! From a request's grammar to its constraint, off the leader's loop.

mod cache;

use std::sync::Arc;
use std::time::Duration;

use galerne_checkpoint::{Checkpoint, TextAssets};
use galerne_grammar::{Constraint, GrammarError, Limits, Vocabulary};
use galerne_text::Tokenizer;
use galerne_types::{Grammar, Request, TokenId};
use tokio::sync::{OnceCell, Semaphore};
use tokio::time::timeout;
use tonic::Status;

use self::cache::Cache;
pub(crate) use self::cache::Counts;

/// Grammars that are compiled at once: the others wait, and the model keeps its processors.
const COMPILING_MAX: usize = 2;

/// Grammars that wait to be compiled before more are refused.
const WAITING_MAX: usize = 256;

/// How long a grammar may take to compile, its turn included; the limits of grammars make nearly all a matter of
/// milliseconds.
const COMPILE_TIMEOUT: Duration = Duration::from_secs(10);

/// Compiles the grammars of one rank's requests. What it needs of the tokenizer it reads when the first one comes.
pub(crate) struct Grammars {
    assets: TextAssets,
    end_tokens: Vec<TokenId>,
    vocab: u32,
    vocabulary: OnceCell<Result<Arc<Vocabulary>, String>>,
    turns: Arc<Semaphore>,
    places: Arc<Semaphore>,
    cache: Arc<Cache>,
}

impl Grammars {
    pub(crate) fn new(checkpoint: &Checkpoint) -> Self {
        let config = checkpoint.config();
        Self {
            assets: checkpoint.text().clone(),
            end_tokens: config.eos.clone(),
            vocab: u32::try_from(config.vocab).unwrap_or(u32::MAX),
            vocabulary: OnceCell::new(),
            turns: Arc::new(Semaphore::new(COMPILING_MAX)),
            places: Arc::new(Semaphore::new(WAITING_MAX)),
            cache: Arc::default(),
        }
    }

    /// The constraint of a request that has a grammar, where a replay's tokens lead in it.
    ///
    /// # Errors
    /// INVALID_ARGUMENT with a sentence for the client: the grammar is wrong or too costly, or this model can keep to
    /// none; RESOURCE_EXHAUSTED if too many wait.
    pub(crate) async fn constraint(&self, request: &Request) -> Result<Option<Box<Constraint>>, Status> {
        let Some(grammar) = &request.grammar else { return Ok(None) };
        if let Some(end) = self.end_tokens.iter().find(|end| !request.stop_tokens.contains(end)) {
            return Err(Status::invalid_argument(format!(
                "an answer under a grammar ends with the model's end tokens, and {end} is not among the stop \
                 tokens: do not ignore them"
            )));
        }
        let _place = Arc::clone(&self.places).try_acquire_owned().map_err(|_| overloaded())?;
        let answer = request.prompt[request.prompt.len() - request.first_index as usize..].to_vec();
        let compile = async {
            let place = self.cache.place(grammar);
            let compiled = place.get_or_try_init(|| self.compile(grammar)).await.cloned();
            self.cache.settle(grammar, &place);
            let compiled = compiled?;
            off_the_loop(move || {
                let mut constraint = compiled.fork();
                constraint.advance(&answer)?;
                constraint.mask()?;
                Ok(Box::new(constraint))
            })
            .await
        };
        let compiled = timeout(COMPILE_TIMEOUT, compile).await;
        compiled
            .map_err(|_| {
                let seconds = COMPILE_TIMEOUT.as_secs();
                Status::invalid_argument(format!(
                    "the grammar was not compiled within {seconds} s: make it simpler"
                ))
            })?
            .map(Some)
    }

    /// The grammars that have been compiled.
    pub(crate) fn cache(&self) -> Arc<Cache> {
        Arc::clone(&self.cache)
    }

    async fn compile(&self, grammar: &Grammar) -> Result<Arc<Constraint>, Status> {
        let (vocabulary, grammar) = (self.vocabulary().await?, grammar.clone());
        let turn = Arc::clone(&self.turns).acquire_owned().await.map_err(|_| overloaded())?;
        off_the_loop(move || {
            let _turn = turn; // kept to the end, also by one that nobody waits for any more
            vocabulary.compile(&grammar, &Limits::default()).map(Arc::new)
        })
        .await
    }

    async fn vocabulary(&self) -> Result<Arc<Vocabulary>, Status> {
        let vocabulary = self.vocabulary.get_or_init(|| async {
            let (assets, end_tokens, vocab) = (self.assets.clone(), self.end_tokens.clone(), self.vocab);
            let loaded = tokio::task::spawn_blocking(move || load(&assets, &end_tokens, vocab)).await;
            loaded.unwrap_or_else(|_| Err("reading the tokenizer panicked".into()))
        });
        vocabulary
            .await
            .clone()
            .map_err(|says| Status::invalid_argument(format!("this model cannot keep to a grammar: {says}")))
    }
}

/// Does what takes a while on a thread of its own.
async fn off_the_loop<T: Send + 'static>(
    work: impl FnOnce() -> Result<T, GrammarError> + Send + 'static,
) -> Result<T, Status> {
    let done = tokio::task::spawn_blocking(work).await;
    let done = done.map_err(|_| Status::internal("compiling panicked"))?;
    done.map_err(|error| Status::invalid_argument(error.to_string()))
}

fn load(assets: &TextAssets, end_tokens: &[TokenId], vocab: u32) -> Result<Arc<Vocabulary>, String> {
    let tokenizer = Tokenizer::load(assets).map_err(|error| error.to_string())?;
    let token = |id| (tokenizer.token_bytes(id), tokenizer.is_special(id));
    let vocabulary = Vocabulary::new(vocab, end_tokens, token).map_err(|error| error.to_string())?;
    Ok(Arc::new(vocabulary))
}

fn overloaded() -> Status {
    Status::resource_exhausted(format!("{WAITING_MAX} grammars wait to be compiled: try again later"))
}
