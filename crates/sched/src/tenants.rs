//! Who is served next, so that a greedy tenant does not make the others wait.

use std::collections::{BTreeMap, VecDeque};

use galerne_types::{Refusal, Request, RequestId, TenantId};

use crate::chain::Chain;

/// Service of one token of a prompt, and of one drawn token: a prompt's tokens share the reading of the weights.
const PROMPT_TOKEN_SERVICE: u64 = 1;
const DRAWN_TOKEN_SERVICE: u64 = 2;

/// Steps for which a tenant counts as present after its last request.
const PRESENT_STEPS: u64 = 4096;

/// Tenants without a request that are remembered all the same.
const IDLE_TENANTS_MAX: usize = 1024;

/// A tenant may hold this many times what it leaves free for the others: alone 3/4 of all, two of them 3/7 each.
const HELD_PER_FREE: u64 = 3;

/// After so many steps a tenant is trusted to need one slot fewer than it once did, and half of its use is forgotten.
const MEMORY_STEPS: u64 = 4096;

/// Tenants are looked through for those that have been away for long once in so many steps.
const SWEEP_STEPS: u64 = 64;

/// A tenant that had nothing to ask comes back ahead of the others by the service of so many full steps, so that a short
/// burst of a tenant that asks little does not wait.
const CREDIT_STEPS: u64 = 4;

/// The queues of all tenants, and how much each was served.
///
/// A tenant's service is counted in tokens (the virtual token counter of Sheng et al., "Fairness in Serving Large
/// Language Models", OSDI 2024), and the one with the least is served next; within a tenant the order is that of arrival.
/// Who comes back from idleness is lifted to the least of those who wait, less a small credit, so that nobody saves up.
#[derive(Debug)]
pub(crate) struct Tenants {
    /// Tenants that are present: with a request here, or not long ago.
    accounts: BTreeMap<TenantId, Account>,
    /// Whose the requests are that wait.
    waiting: BTreeMap<RequestId, TenantId>,
    arrivals: u64,
    /// What whoever was admitted last had been served: where a tenant starts that comes while nobody waits.
    virtual_time: u64,
    credit: u64,
    /// The step that was planned last.
    step: u64,
    /// Until a request comes or goes.
    all: Option<All>,
}

/// What is added up over all accounts: between two requests that come or go it stays the same, step by step.
#[derive(Clone, Copy, Debug)]
struct All {
    /// Tenants that have a request here.
    busy: u32,
    /// What the tenants may yet want, each of its equal share.
    wanted: Held,
    /// A tenant's next request fits its equal share.
    entitled: bool,
}

/// One tenant.
#[derive(Debug, Default)]
struct Account {
    waiting: VecDeque<Arrived>,
    service: u64,
    /// What it was served of late, while it was present: unlike `service` that is not lifted when it comes back, so it
    /// tells who uses much and who uses little.
    used: u64,
    /// Prompt tokens of admitted requests that no step holds yet.
    outstanding: u64,
    /// By those of its requests that run.
    held: Held,
    /// By all of its requests, the waiting ones included.
    asked: Held,
    /// The most that it asked for at once, not long ago.
    peak: Held,
    /// The last step before which it had a request.
    seen: u64,
    /// The last step for which its next request was put off.
    put_off: Option<u64>,
}

/// A waiting request.
#[derive(Debug)]
pub(crate) struct Arrived {
    /// In the order of arrival; 0 of one that was accepted before, by this group or another.
    number: u64,
    /// What it can need at once.
    pub(crate) kv_blocks: u32,
    /// It has run before.
    pub(crate) resumes: bool,
    pub(crate) request: Request,
    /// As far as it was worked out.
    pub(crate) chain: Chain,
}

/// Slots, and KV blocks.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct Held {
    pub(crate) slots: u32,
    pub(crate) kv_blocks: u32,
}

impl Held {
    pub(crate) fn of_one(kv_blocks: u32) -> Self {
        Self { slots: 1, kv_blocks }
    }

    pub(crate) fn add(&mut self, other: Self) {
        self.slots += other.slots;
        self.kv_blocks += other.kv_blocks;
    }

    pub(crate) fn subtract(&mut self, other: Self) {
        self.slots -= other.slots;
        self.kv_blocks -= other.kv_blocks;
    }

    fn max(self, other: Self) -> Self {
        Self { slots: self.slots.max(other.slots), kv_blocks: self.kv_blocks.max(other.kv_blocks) }
    }

    /// One of so many equal shares.
    fn share(self, of: usize) -> Self {
        let of = (of as u32).max(1);
        Self { slots: self.slots / of, kv_blocks: self.kv_blocks / of }
    }
}

impl Account {
    fn is_idle(&self) -> bool {
        self.waiting.is_empty() && self.held.slots == 0
    }

    /// Whether a request that can need so many blocks fits its equal share.
    fn is_entitled(&self, kv_blocks: u32, share: Held) -> bool {
        self.held.slots < share.slots.max(1) && self.held.kv_blocks + kv_blocks <= share.kv_blocks
    }

    /// What it may yet want of its equal share.
    fn wanted(&self, share: Held) -> Held {
        let wanted = |of: fn(&Held) -> u32| of(&self.peak).min(of(&share)).saturating_sub(of(&self.held));
        Held { slots: wanted(|held| held.slots), kv_blocks: wanted(|held| held.kv_blocks) }
    }

    fn serve(&mut self, service: u64) {
        self.service += service;
        self.used += service;
    }

    /// Lowers the peak by one request of mean size, but not below what it asks for now.
    fn forget_peak(&mut self) {
        let Held { slots, kv_blocks } = self.peak;
        let one = kv_blocks.checked_div(slots).unwrap_or(0);
        let lower = Held { slots: slots.saturating_sub(1), kv_blocks: kv_blocks - one };
        self.peak = lower.max(self.asked);
    }
}

impl Tenants {
    pub(crate) fn new(step_tokens_max: u32) -> Self {
        let credit = CREDIT_STEPS * u64::from(step_tokens_max);
        let (accounts, waiting) = (BTreeMap::new(), BTreeMap::new());
        Self { accounts, waiting, arrivals: 0, virtual_time: 0, credit, step: 0, all: None }
    }

    /// Requests that wait.
    pub(crate) fn waiting(&self) -> usize {
        self.waiting.len()
    }

    /// Whether the request waits.
    pub(crate) fn holds(&self, id: RequestId) -> bool {
        self.waiting.contains_key(&id)
    }

    /// Tenants that have a request here.
    pub(crate) fn busy(&self) -> usize {
        self.accounts.values().filter(|account| !account.is_idle()).count()
    }

    /// Puts a request that can need so many blocks in its tenant's queue, behind those that are as urgent.
    ///
    /// # Errors
    /// [`Refusal::Overloaded`] if none of `waiting_max` places is free, or too few for the tenant to take another one.
    pub(crate) fn submit(
        &mut self,
        request: Request,
        kv_blocks: u32,
        waiting_max: usize,
    ) -> Result<(), Refusal> {
        let tenant = request.tenant;
        let waiting = self.accounts.get(&tenant).map_or(0, |account| account.waiting.len());
        let free = waiting_max.saturating_sub(self.waiting.len());
        if free == 0 || waiting as u64 >= HELD_PER_FREE * free as u64 {
            return Err(Refusal::Overloaded { waiting });
        }
        self.arrivals += 1;
        self.arrive(request, kv_blocks, self.arrivals);
        Ok(())
    }

    /// Puts a request in its tenant's queue that another group had accepted: there is a place for it, before those that are new
    /// and as urgent.
    pub(crate) fn take_over(&mut self, request: Request, kv_blocks: u32) {
        self.arrive(request, kv_blocks, 0);
    }

    fn arrive(&mut self, request: Request, kv_blocks: u32, number: u64) {
        let tenant = request.tenant;
        self.all = None;
        let start = self.start().saturating_sub(self.credit);
        let used = self.least_used().saturating_sub(self.credit);
        let account = self.accounts.entry(tenant).or_insert_with(|| Account { used, ..Account::default() });
        if account.waiting.is_empty() {
            account.service = account.service.max(start);
        }
        account.seen = self.step;
        account.asked.add(Held::of_one(kv_blocks));
        account.peak = account.peak.max(account.asked);
        self.waiting.insert(request.id, tenant);
        let place = |number: u64, request: &Request| (request.priority, number > 0);
        let own = place(number, &request);
        let before = account.waiting.partition_point(|other| place(other.number, &other.request) <= own);
        let chain = Chain::default();
        account.waiting.insert(before, Arrived { number, kv_blocks, resumes: false, request, chain });
    }

    /// Puts the rest of a request that gave its slot up in its tenant's queue, before those that are as urgent.
    pub(crate) fn put_back(&mut self, request: Request, chain: Chain, kv_blocks: u32) {
        self.all = None;
        let account = self.accounts.entry(request.tenant).or_default();
        account.asked.add(Held::of_one(kv_blocks));
        self.waiting.insert(request.id, request.tenant);
        let before = account.waiting.partition_point(|other| other.request.priority < request.priority);
        account.waiting.insert(before, Arrived { number: 0, kv_blocks, resumes: true, request, chain });
    }

    /// Whether a tenant's next request, which can need so many blocks, fits its equal share among those that have
    /// requests here: then it need not wait for others who have more.
    pub(crate) fn is_entitled(&mut self, tenant: TenantId, kv_blocks: u32, total: Held) -> bool {
        let share = self.share(total);
        self.accounts.get(&tenant).is_some_and(|account| account.is_entitled(kv_blocks, share))
    }

    /// Whether that is so for any tenant: else nobody who comes while all slots are taken gets one from another.
    pub(crate) fn anyone_is_entitled(&mut self, total: Held) -> bool {
        self.all(total).entitled
    }

    /// An equal share among those that have requests here.
    pub(crate) fn share(&mut self, total: Held) -> Held {
        total.share(self.all(total).busy as usize)
    }

    fn all(&mut self, total: Held) -> All {
        *self.all.get_or_insert_with(|| {
            let busy = self.accounts.values().filter(|account| !account.is_idle()).count();
            let (equal, present) = (total.share(busy), total.share(self.accounts.len()));
            let mut all = All { busy: busy as u32, wanted: Held::default(), entitled: false };
            for account in self.accounts.values() {
                all.wanted.add(account.wanted(present));
                let next = account.waiting.front();
                all.entitled |= next.is_some_and(|next| account.is_entitled(next.kv_blocks, equal));
            }
            all
        })
    }

    /// What those requests of a tenant hold that run and go on.
    pub(crate) fn held(&self, tenant: TenantId) -> Held {
        self.accounts.get(&tenant).map_or(Held::default(), |account| account.held)
    }

    /// Where a tenant starts that comes now: level with the least served of those who wait.
    fn start(&self) -> u64 {
        let waiting = self.accounts.values().filter(|account| !account.waiting.is_empty());
        waiting.map(|account| account.service).min().unwrap_or(self.virtual_time)
    }

    /// Takes a request out of its queue.
    pub(crate) fn cancel(&mut self, id: RequestId) {
        let Some(tenant) = self.waiting.remove(&id) else { return };
        self.all = None;
        let account = self.accounts.entry(tenant).or_default();
        let position = account.waiting.iter().position(|arrived| arrived.request.id == id);
        if let Some(arrived) = position.and_then(|position| account.waiting.remove(position)) {
            account.asked.subtract(Held::of_one(arrived.kv_blocks));
        }
    }

    /// Whose turn it is, and how many blocks the request can need: the oldest one of the least served tenant that does
    /// not hold too much of `total` already.
    pub(crate) fn due(&mut self, free: Held, total: Held) -> Option<(TenantId, u32)> {
        let (wanted, share) = (self.all(total).wanted, total.share(self.accounts.len()));
        let stock = Stock { free, share, wanted };
        let may_hold = |account: &Account, arrived: &Arrived| {
            self.accounts.len() == 1
                || account.held.slots == 0
                || stock.may_take(account, 1, |held| held.slots)
                    && stock.may_take(account, arrived.kv_blocks, |held| held.kv_blocks)
        };
        let (mut first, mut due) = ((u64::MAX, u32::MAX, u64::MAX), None);
        for (&tenant, account) in &self.accounts {
            let Some(arrived) = account.waiting.front() else { continue };
            let turn = (account.service + account.outstanding, account.held.slots, arrived.number);
            if turn < first && account.put_off != Some(self.step) && may_hold(account, arrived) {
                (first, due) = (turn, Some((tenant, arrived.kv_blocks)));
            }
        }
        due
    }

    /// The oldest request of a tenant.
    pub(crate) fn front(&mut self, tenant: TenantId) -> Option<&mut Arrived> {
        self.accounts.get_mut(&tenant)?.waiting.front_mut()
    }

    /// The oldest request of a tenant is not due in the step that is being planned.
    pub(crate) fn put_off(&mut self, tenant: TenantId) {
        if let Some(account) = self.accounts.get_mut(&tenant) {
            account.put_off = Some(self.step);
        }
    }

    /// Gives out the oldest request of a tenant, which from now on holds a slot and so many blocks; the first
    /// `cached` tokens of its prompt need not be run.
    pub(crate) fn admit(&mut self, tenant: TenantId, kv_blocks: u32, cached: u32) -> Option<Arrived> {
        let account = self.accounts.get_mut(&tenant)?;
        let arrived = account.waiting.pop_front()?;
        self.all = None;
        self.waiting.remove(&arrived.request.id);
        self.virtual_time = self.virtual_time.max(account.service);
        account.held.add(Held::of_one(kv_blocks));
        let prompt = arrived.request.prompt.len() as u64;
        account.outstanding += PROMPT_TOKEN_SERVICE * (prompt - u64::from(cached));
        Some(arrived)
    }

    /// Takes back a slot and the blocks of a request that could need `asked`; `unplanned` tokens of the prompt were never
    /// run.
    pub(crate) fn release(&mut self, tenant: TenantId, kv_blocks: u32, asked: u32, unplanned: u32) {
        self.all = None;
        let account = self.accounts.entry(tenant).or_default();
        account.held.subtract(Held::of_one(kv_blocks));
        account.asked.subtract(Held::of_one(asked));
        account.outstanding -= PROMPT_TOKEN_SERVICE * u64::from(unplanned);
    }

    /// A step holds so many tokens of a tenant's prompt.
    pub(crate) fn serve_prompt(&mut self, tenant: TenantId, tokens: u32) {
        let service = PROMPT_TOKEN_SERVICE * u64::from(tokens);
        let account = self.accounts.entry(tenant).or_default();
        account.serve(service);
        account.outstanding -= service;
    }

    /// A step draws a token of a tenant's answer.
    pub(crate) fn serve_answer(&mut self, tenant: TenantId) {
        self.accounts.entry(tenant).or_default().serve(DRAWN_TOKEN_SERVICE);
    }

    /// How much a tenant was served.
    pub(crate) fn service(&self, tenant: TenantId) -> u64 {
        self.accounts.get(&tenant).map_or(0, |account| account.service)
    }

    /// What a tenant was served of late.
    pub(crate) fn used(&self, tenant: TenantId) -> u64 {
        self.accounts.get(&tenant).map_or(0, |account| account.used)
    }

    /// The least of that among all who are present, with a request or without.
    pub(crate) fn least_used(&self) -> u64 {
        self.accounts.values().map(|account| account.used).min().unwrap_or(0)
    }

    /// Step `number` is being planned: forgets who has been away for long, now and then.
    pub(crate) fn begin_step(&mut self, number: u64) {
        self.step = number;
        if !number.is_multiple_of(SWEEP_STEPS) {
            return;
        }
        self.all = None;
        self.accounts.retain(|_, account| {
            if !account.is_idle() {
                account.seen = number;
            }
            if number.is_multiple_of(MEMORY_STEPS) {
                account.forget_peak();
                account.used /= 2;
            }
            number - account.seen <= PRESENT_STEPS
        });
        let idle = self.accounts.iter().filter(|(_, account)| account.is_idle());
        let mut idle: Vec<_> = idle.map(|(&tenant, account)| (account.seen, tenant)).collect();
        if idle.len() > IDLE_TENANTS_MAX {
            idle.sort_unstable();
            for (_, tenant) in &idle[..idle.len() - IDLE_TENANTS_MAX] {
                self.accounts.remove(tenant);
            }
        }
    }
}

/// Slots and blocks, and who may take of them.
struct Stock {
    free: Held,
    /// An equal share.
    share: Held,
    /// What the tenants may yet want, each of its equal share.
    wanted: Held,
}

impl Stock {
    /// Whether a tenant may take so many more: up to an equal share always; beyond it while it leaves to the others what
    /// they wanted lately, and something for whoever comes (the dynamic thresholds of Choudhury and Hahne, IEEE/ACM
    /// Transactions on Networking, 1998).
    fn may_take(&self, account: &Account, more: u32, of: fn(&Held) -> u32) -> bool {
        let holds = of(&account.held) + more;
        let left = of(&self.free).saturating_sub(more);
        let wanted = of(&self.wanted) - of(&account.wanted(self.share));
        holds <= of(&self.share) || left >= wanted && u64::from(holds) <= HELD_PER_FREE * u64::from(left)
    }
}

#[cfg(test)]
mod tests {
    use galerne_types::Sampling;

    use super::*;

    const A: TenantId = TenantId(1);
    const B: TenantId = TenantId(2);

    fn request(id: u64, tenant: TenantId) -> Request {
        Request {
            id: RequestId(id),
            tenant,
            prompt: vec![1; 10],
            first_index: 0,
            sampling: Sampling::greedy(),
            max_tokens: 10,
            min_tokens: 0,
            stop_tokens: Vec::new(),
            prompt_logprobs: None,
            grammar: None,
            cache_salt: None,
            priority: 0,
            trace: None,
        }
    }

    fn run(tenants: &mut Tenants, id: u64, tenant: TenantId, answers: u64) {
        tenants.submit(request(id, tenant), 1, 100).unwrap();
        tenants.admit(tenant, 1, 0).unwrap();
        tenants.serve_prompt(tenant, 10);
        (0..answers).for_each(|_| tenants.serve_answer(tenant));
        tenants.release(tenant, 1, 1, 0);
    }

    #[test]
    fn a_prompts_tokens_count_once_and_drawn_ones_twice() {
        let mut tenants = Tenants::new(64);
        run(&mut tenants, 0, A, 7);
        assert_eq!(tenants.service(A), 10 + 14);
    }

    #[test]
    fn what_was_accepted_before_waits_ahead_of_what_is_new_and_finds_a_place_where_all_are_taken() {
        let mut tenants = Tenants::new(64);
        let urgent = |id, priority| Request { priority, ..request(id, A) };
        tenants.submit(request(0, A), 1, 2).unwrap();
        tenants.take_over(request(1, A), 1);
        tenants.take_over(request(2, A), 1);
        tenants.take_over(urgent(3, -1), 1);
        assert_eq!(tenants.submit(urgent(4, -1), 1, 2), Err(Refusal::Overloaded { waiting: 4 }));
        tenants.submit(urgent(5, -1), 1, 9).unwrap();
        tenants.put_back(request(6, A), Chain::default(), 1);
        let order: Vec<_> = std::iter::from_fn(|| Some(tenants.admit(A, 1, 0)?.request.id.0)).collect();
        assert_eq!(order, [3, 5, 6, 1, 2, 0]);
    }

    #[test]
    fn nobody_saves_up_more_than_the_credit() {
        let mut tenants = Tenants::new(64);
        run(&mut tenants, 0, B, 1);
        run(&mut tenants, 1, A, 5000);
        tenants.submit(request(2, A), 1, 100).unwrap();
        tenants.submit(request(3, B), 1, 100).unwrap();
        assert_eq!(tenants.service(A) - tenants.service(B), 4 * 64);
        let newcomer = TenantId(3);
        tenants.submit(request(4, newcomer), 1, 100).unwrap();
        assert_eq!(tenants.service(newcomer), tenants.service(B) - 4 * 64);
    }

    #[test]
    fn who_holds_much_leaves_what_others_wanted_lately() {
        let mut tenants = Tenants::new(64);
        let total = Held { slots: 16, kv_blocks: 160 };
        let fill = |tenants: &mut Tenants, from: u64| {
            let mut free = total;
            for id in from..from + 20 {
                tenants.submit(request(id, A), 1, 1000).unwrap();
            }
            while let Some((tenant, kv_blocks)) = tenants.due(free, total) {
                tenants.admit(tenant, kv_blocks, 0).unwrap();
                free.subtract(Held::of_one(kv_blocks));
                if free.slots == 0 {
                    break;
                }
            }
            free.slots
        };
        assert_eq!(fill(&mut tenants, 0), 0, "alone it may have all");

        let mut tenants = Tenants::new(64);
        run(&mut tenants, 90, B, 1);
        assert_eq!(fill(&mut tenants, 0), 4, "a quarter for whoever comes");

        let mut tenants = Tenants::new(64);
        for id in 90..96 {
            tenants.submit(request(id, B), 1, 1000).unwrap();
        }
        (90..96).for_each(|id| tenants.cancel(RequestId(id)));
        assert_eq!(fill(&mut tenants, 0), 6, "the other wanted six");
    }

    #[test]
    fn tenants_are_forgotten() {
        let mut tenants = Tenants::new(64);
        for id in 0..3000 {
            run(&mut tenants, id, TenantId(id), 1);
        }
        tenants.begin_step(SWEEP_STEPS);
        assert_eq!(tenants.accounts.len(), IDLE_TENANTS_MAX);
        tenants.submit(request(5000, A), 1, 100).unwrap();
        tenants.begin_step(PRESENT_STEPS + 2 * SWEEP_STEPS);
        assert_eq!(tenants.accounts.keys().collect::<Vec<_>>(), [&A]);
        run(&mut tenants, 6000, B, 1);
        tenants.begin_step(PRESENT_STEPS + 3 * SWEEP_STEPS);
        assert!(tenants.accounts.contains_key(&B), "it was here between two looks");
    }
}
