use std::ffi::OsString;
use std::fmt;
use std::str::FromStr;

use galerne_model::{Cores, CpuList, Isa};

use crate::error::WorkerError;

/// How a rank uses this host's CPU.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Processor {
    /// Instruction set of the kernels, instead of the best that there is.
    pub isa: Option<Isa>,
    /// CPUs that ranks have for themselves, instead of all that the process may run on.
    pub cores: Option<CpuList>,
    /// Which of these the group has, where the host has several groups.
    pub share: CoresShare,
}

impl Processor {
    /// What a command line says of it.
    pub(super) fn args(&self, flag: &mut impl FnMut(&str, OsString)) {
        let Self { isa, cores, share } = self;
        if let Some(isa) = isa {
            flag("--isa", isa.to_string().into());
        }
        if let Some(cores) = cores {
            flag("--cores", cores.to_string().into());
        }
        if *share != CoresShare::default() {
            flag("--cores-share", share.to_string().into());
        }
    }

    /// The kernels' instruction set.
    pub fn isa(&self) -> Isa {
        self.isa.unwrap_or_else(Isa::best)
    }

    /// The cores of the group on this host; `None` where the system does not tell.
    pub(crate) fn cores(&self) -> Result<Option<Cores>, WorkerError> {
        let found = Cores::of_machine(self.cores.as_ref());
        if let (None, Some(named), Some(all)) = (&found, &self.cores, Cores::of_machine(None)) {
            return Err(WorkerError::Options(format!("--cores {named}: this process may only run on {all}")));
        }
        Ok(found.map(|cores| cores.share(self.share.part.into(), self.share.parts.into())))
    }
}

/// The `part`-th, from 0, of `parts` equal shares of something: `1/4`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct CoresShare {
    part: u16,
    parts: u16,
}

impl CoresShare {
    /// `None` if there is no such part.
    pub fn new(part: u16, parts: u16) -> Option<Self> {
        (part < parts).then_some(Self { part, parts })
    }
}

impl Default for CoresShare {
    /// Everything.
    fn default() -> Self {
        Self { part: 0, parts: 1 }
    }
}

impl fmt::Display for CoresShare {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}/{}", self.part, self.parts)
    }
}

impl FromStr for CoresShare {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let parts =
            text.split_once('/').and_then(|(part, parts)| Some((part.parse().ok()?, parts.parse().ok()?)));
        let share = parts.and_then(|(part, parts)| Self::new(part, parts));
        share.ok_or_else(|| format!("{text:?} is no share: the second of three is 1/3"))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn shares_are_parts_of_a_whole() {
        assert_eq!("1/3".parse(), Ok(CoresShare { part: 1, parts: 3 }));
        assert_eq!("1/3".parse::<CoresShare>().unwrap().to_string(), "1/3");
        for wrong in ["", "1", "3/3", "-1/2", "1/0", "a/b"] {
            assert!(wrong.parse::<CoresShare>().unwrap_err().contains("is no share"), "{wrong}");
        }
    }

    #[test]
    fn cores_that_are_not_there_are_refused_with_those_that_are() {
        let processor =
            |cores: &str| Processor { cores: Some(cores.parse().unwrap()), ..Processor::default() };
        let error = processor("1023").cores().unwrap_err().to_string();
        assert!(error.contains("--cores 1023: this process may only run on 0"), "{error}");
        assert_eq!(processor("0").cores().unwrap().map(|cores| cores.count()), Some(1));
    }
}
