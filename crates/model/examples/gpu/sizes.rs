//! What is measured: on a GPU with a model of 7 B, in a hurry, and on an emulator with a tiny one.

/// Sequences that decode beside each other, and how far each has come.
#[derive(Clone, Copy)]
pub(crate) struct Case {
    pub(crate) batch: usize,
    pub(crate) context: usize,
}

pub(crate) struct Sizes {
    /// Those of one batch follow each other with growing contexts.
    pub(crate) decode: Vec<Case>,
    /// Long contexts, each beside what the same batch takes at `short`.
    pub(crate) attention: Vec<Case>,
    pub(crate) short: usize,
    /// Tokens of prompts that run at once, and of the longest, which is also the most of a step.
    pub(crate) prefills: Vec<usize>,
    pub(crate) prefill: usize,
    /// Steps that are measured, and those before that are not.
    pub(crate) steps: usize,
    pub(crate) warm_up: usize,
}

impl Sizes {
    pub(crate) fn of(emulate: bool, quick: bool) -> Self {
        let case = |batch, context| Case { batch, context };
        if emulate {
            let decode = vec![case(1, 8), case(2, 8), case(2, 40)];
            let attention = vec![case(1, 100)];
            return Self {
                decode,
                attention,
                short: 8,
                prefills: vec![20, 70],
                prefill: 70,
                steps: 2,
                warm_up: 1,
            };
        }
        let decode = match quick {
            true => vec![case(1, 128), case(8, 128), case(64, 1024)],
            false => {
                [1, 8, 64, 256].into_iter().flat_map(|batch| [case(batch, 128), case(batch, 1024)]).collect()
            }
        };
        let attention = match quick {
            true => vec![case(8, 4096)],
            false => vec![case(1, 4096), case(8, 4096), case(1, 32_000)],
        };
        let steps = if quick { 20 } else { 60 };
        let prefills = if quick { vec![2048] } else { vec![256, 512, 1024, 2048] };
        Self { decode, attention, short: 128, prefills, prefill: 2048, steps, warm_up: 4 }
    }

    /// Positions that a case needs at most.
    pub(crate) fn positions(&self, case: Case) -> usize {
        case.context + self.warm_up + self.steps
    }
}
