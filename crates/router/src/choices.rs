//! Several answers to one request, merged as their tokens come.

use std::future::poll_fn;
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll};

use galerne_types::ModelCard;

use crate::answer::{Answer, Common, Delta};
use crate::ask::{Resume, Several};
use crate::failure::Failure;
use crate::limits::RequestLimits;
use crate::metrics::Meter;
use crate::model::Model;
use crate::serve::Router;

/// Answers under way, each a request of its own at a group. The choices of the first prompt come first. Dropping them
/// cancels them all.
pub(crate) struct Choices {
    model: Arc<Model>,
    slots: Vec<Slot>,
    /// Answers to each prompt.
    each: usize,
    /// The slot that is asked first, so that none of them is always asked last.
    turn: usize,
    /// Answers that have not ended.
    left: usize,
    /// Nobody streams them.
    held: bool,
}

/// One answer.
enum Slot {
    /// Its first token has not come.
    Opening(Pin<Box<dyn Future<Output = Result<Answer, Failure>> + Send>>),
    Running(Box<Answer>),
}

/// What an answer of several did; the number is its place among them.
pub(crate) type News = Result<(usize, Delta), Failure>;

impl Choices {
    /// Begins all answers, and returns when the first token of one of them is there.
    pub(crate) async fn start(router: &Arc<Router>, asked: Several) -> Result<Self, Failure> {
        let model = router.model(&asked.model)?;
        asked.caller.begin()?;
        let mut meter = Meter::new(model.metrics.clone());
        let prepared = Self::prepare(router, &model, asked).await;
        let (prompts, each) = prepared.inspect_err(|failure| meter.fail(failure))?;
        if let ([common], 1) = (prompts.as_slice(), each) {
            let answer = Answer::open(common, 0, meter, Resume::default()).await?;
            return Ok(Self {
                model,
                slots: vec![Slot::Running(Box::new(answer))],
                each: 1,
                turn: 0,
                left: 1,
                held: false,
            });
        }
        let numbered = prompts.iter().flat_map(|common| (0..each).map(move |number| (common, number)));
        let numbered: Vec<_> = numbered.collect();
        let mut meters: Vec<_> = numbered.iter().skip(1).map(|_| meter.sibling()).collect();
        meters.push(meter);
        let slots = numbered.into_iter().zip(meters).map(|((common, number), meter)| {
            let common = common.clone();
            Slot::Opening(Box::pin(
                async move { Answer::open(&common, number, meter, Resume::default()).await },
            ))
        });
        let slots: Vec<_> = slots.collect();
        let mut choices = Self { model, left: slots.len(), slots, each: each as usize, turn: 0, held: false };
        poll_fn(|context| choices.poll_open(context)).await?;
        Ok(choices)
    }

    async fn prepare(
        router: &Arc<Router>,
        model: &Arc<Model>,
        asked: Several,
    ) -> Result<(Vec<Arc<Common>>, u32), Failure> {
        let Several { model: _, prompts, each, mut options, mut caller } = asked;
        caller.claim(&router.repeats)?;
        options.draw_seed(&caller);
        let &RequestLimits { prompts_max, choices_max, .. } = &router.requests;
        let count = prompts.len();
        if count > prompts_max {
            let message =
                format!("prompts must be at most {prompts_max}, not {count}: send several requests");
            return Err(Failure::invalid("prompt", message));
        }
        let choices = (count as u64).saturating_mul(each.into());
        if choices > choices_max.into() {
            let (field, what) =
                if each > 1 { ("n", "n times the number of prompts") } else { ("prompt", "prompts") };
            let message =
                format!("{what} must be at most {choices_max}, not {choices}: send several requests");
            return Err(Failure::invalid(field, message));
        }
        options.check(&router.requests)?;
        let options = Arc::new(options);
        let mut common = Vec::with_capacity(prompts.len());
        for (number, prompt) in prompts.into_iter().enumerate() {
            let asked = Common::new(router, model, prompt, &options, each, &caller).await?;
            common.push(Arc::new(asked.at(number, each)));
        }
        caller.release(); // its body has become tokens
        Ok((common, each))
    }

    /// Asks every answer that has no first token for it, until one has.
    fn poll_open(&mut self, context: &mut Context<'_>) -> Poll<Result<(), Failure>> {
        let mut open = false;
        for slot in &mut self.slots {
            open |= slot.poll_answer(context, false)?.is_ready();
        }
        if open { Poll::Ready(Ok(())) } else { Poll::Pending }
    }

    /// Their client wants them whole.
    pub(crate) fn hold(&mut self) {
        self.held = true;
        self.running().for_each(Answer::hold);
    }

    /// The next delta of any answer, or an error, which ends them all; `None` after the last.
    pub(crate) async fn next(&mut self) -> Option<News> {
        poll_fn(|context| self.poll_next(context)).await
    }

    /// As [`next`](Self::next).
    pub(crate) fn poll_next(&mut self, context: &mut Context<'_>) -> Poll<Option<News>> {
        if self.left == 0 {
            return Poll::Ready(None);
        }
        for step in 0..self.slots.len() {
            let at = (self.turn + step) % self.slots.len();
            let news = match self.slots[at].poll_answer(context, self.held) {
                Poll::Ready(Ok(answer)) => answer.poll_next(context),
                Poll::Ready(Err(failure)) => Poll::Ready(Some(Err(failure))),
                Poll::Pending => Poll::Pending,
            };
            let Poll::Ready(Some(delta)) = news else { continue };
            self.turn = at + 1;
            match &delta {
                Ok(delta) => self.left -= usize::from(delta.finish.is_some()),
                Err(_) => self.cancel(),
            }
            return Poll::Ready(Some(delta.map(|delta| (at, delta))));
        }
        Poll::Pending
    }

    /// From now on their reader is woken when so many events of one of them wait, or its last.
    pub(crate) fn tell_at(&mut self, events: usize) {
        self.running().for_each(|answer| answer.tell_at(events));
    }

    fn running(&mut self) -> impl Iterator<Item = &mut Answer> {
        self.slots.iter_mut().filter_map(|slot| match slot {
            Slot::Opening(_) => None,
            Slot::Running(answer) => Some(&mut **answer),
        })
    }

    fn cancel(&mut self) {
        self.left = 0;
        self.slots.clear();
    }

    pub(crate) fn model(&self) -> &Model {
        &self.model
    }

    /// How many there are.
    pub(crate) fn len(&self) -> usize {
        self.slots.len()
    }

    /// Answers to each prompt.
    pub(crate) fn each(&self) -> usize {
        self.each
    }

    /// The answer of that number, once its first token is there.
    pub(crate) fn answer(&self, at: usize) -> Option<&Answer> {
        match self.slots.get(at)? {
            Slot::Opening(_) => None,
            Slot::Running(answer) => Some(answer),
        }
    }

    /// What an answering group serves.
    pub(crate) fn card(&self) -> Option<&ModelCard> {
        (0..self.len()).find_map(|at| self.answer(at)).map(Answer::card)
    }

    /// Tokens of the prompts, each counted once, as far as they are known.
    pub(crate) fn prompt_tokens(&self) -> usize {
        let firsts = (0..self.len()).step_by(self.each.max(1));
        firsts.filter_map(|at| self.answer(at)).map(|answer| answer.prompt().len()).sum()
    }

    /// Those of them that were not computed again.
    pub(crate) fn cached_tokens(&self) -> usize {
        let firsts = (0..self.len()).step_by(self.each.max(1));
        firsts.filter_map(|at| self.answer(at)).map(Answer::cached_tokens).sum()
    }

    /// Tokens generated so far, by all answers.
    pub(crate) fn generated(&self) -> usize {
        (0..self.len()).filter_map(|at| self.answer(at)).map(Answer::generated).sum()
    }
}

impl Slot {
    fn poll_answer(&mut self, context: &mut Context<'_>, held: bool) -> Poll<Result<&mut Answer, Failure>> {
        if let Self::Opening(opening) = self {
            match opening.as_mut().poll(context) {
                Poll::Ready(Ok(mut answer)) => {
                    if held {
                        answer.hold();
                    }
                    *self = Self::Running(Box::new(answer));
                }
                Poll::Ready(Err(failure)) => return Poll::Ready(Err(failure)),
                Poll::Pending => return Poll::Pending,
            }
        }
        match self {
            Self::Running(answer) => Poll::Ready(Ok(answer)),
            Self::Opening(_) => Poll::Pending,
        }
    }
}
