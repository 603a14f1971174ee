//! The fleet as this router uses it: who takes requests, how loaded, and an open channel to each leader.

use std::collections::{BTreeMap, HashMap};
use std::convert::Infallible;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use galerne_dispatch::{BreakerState, Dispatcher, Losses, Suspicion, Ticket, Want};
use galerne_tls::Way;
use galerne_types::limits::GRPC_MESSAGE_BYTES_MAX;
use galerne_types::{Epoch, Fleet, Group, GroupId, Health, ModelCard};
use galerne_wire::v1::engine_client::EngineClient;
use galerne_wire::v1::{LoadReport, LoadRequest};
use galerne_wire::{RepeatKey, show_secret};
use tokio::sync::watch;
use tokio::time::{Instant, timeout};
use tonic::transport::{Channel, Endpoint};
use tonic::{Request, Status, Streaming};

use crate::ask::random_seed;
use crate::failure::Failure;
use crate::limits::{CONNECT_MS_MAX, FLEET_MOVE_MS_MAX, LINK_WINDOW_BYTES, PING_MS, PONG_MS_MAX, PROBE_MS};
use crate::link::Link;
use crate::standing::Standing;

/// All groups. Cheap questions under one lock, which is never held across a wait.
pub(crate) struct Groups {
    state: Mutex<State>,
    fleet: watch::Receiver<Fleet>,
    /// Rings when a group was lost, or found again, without the fleet having moved.
    rotation: watch::Sender<()>,
    /// The dispatcher's time counts from here, by the clock by which what it waits for is waited for.
    began: Instant,
}

/// Tells of changes of the fleet and of what this router thinks of it.
pub(crate) type Watch = (watch::Receiver<Fleet>, watch::Receiver<()>);

struct State {
    fleet: watch::Receiver<Fleet>,
    /// What it showed last, with the words of leaders whose leases it has lost sight of while they serve this router.
    seen: Fleet,
    dispatcher: Dispatcher,
    /// To leaders, by their addresses.
    channels: HashMap<String, Channel>,
    links: BTreeMap<GroupId, Tie>,
    /// Incarnations of groups that were lost, and of each group the newest of them.
    losses: Losses,
    counted: BTreeMap<GroupId, Epoch>,
    /// Groups whose leaders could not be reached, and the incarnation that could not.
    lost: BTreeMap<GroupId, Epoch>,
    /// Groups whose leaders have said that they are drained, before the fleet has.
    drained: BTreeMap<GroupId, Epoch>,
    /// Digests of the models whose text this router handles, by name.
    digests: BTreeMap<String, String>,
    /// How leaders are called.
    way: Way,
}

/// To a leader, too: one stream for all requests of an epoch.
struct Tie {
    /// What the leader said of itself when it was opened.
    health: Health,
    link: Arc<Link>,
}

/// A request's place at a group: counts as load there until it is dropped.
pub(crate) struct Place {
    pub(crate) group: GroupId,
    pub(crate) epoch: Epoch,
    /// What the group serves; its S is part of the numerics.
    pub(crate) model: ModelCard,
    pub(crate) link: Arc<Link>,
    ticket: Option<Ticket>,
    groups: Arc<Groups>,
}

impl Drop for Place {
    fn drop(&mut self) {
        if let Some(ticket) = self.ticket.take() {
            let mut state = self.groups.current();
            state.dispatcher.finished(ticket);
            if state.dispatcher.breaker(&self.group, self.groups.now()) == BreakerState::Probing {
                self.groups.rotation.send_replace(()); // the next one may try it
            }
        }
    }
}

/// A group that serves, and how to reach its leader.
pub(crate) struct Leading {
    pub(crate) group: GroupId,
    pub(crate) epoch: Epoch,
    /// The name of what it serves.
    pub(crate) model: String,
    pub(crate) leader: EngineClient<Channel>,
    /// The epoch's secret, which the leader wants to see.
    pub(crate) secret: String,
}

impl Leading {
    /// What the leader tells of its load, while it leads that epoch.
    pub(crate) async fn reports(&self) -> Result<Streaming<LoadReport>, Status> {
        let mut request = Request::new(LoadRequest { epoch: self.epoch.0 });
        show_secret(&mut request, &self.secret)?;
        Ok(self.leader.clone().load(request).await?.into_inner())
    }
}

/// One group, as [`Groups::list`] tells of it.
pub(crate) struct Listed {
    pub(crate) id: GroupId,
    pub(crate) group: Group,
    pub(crate) standing: Standing,
    /// Whether its weights are the ones that this router knows under their name.
    pub(crate) same_weights: bool,
    /// Requests of this router that run there.
    pub(crate) in_flight: u32,
    /// Whether it gets new ones, as far as failures tell.
    pub(crate) breaker: BreakerState,
}

impl Groups {
    pub(crate) fn new(
        fleet: watch::Receiver<Fleet>,
        digests: BTreeMap<String, String>,
        way: Way,
    ) -> Arc<Self> {
        let mut seen = fleet.clone();
        seen.mark_changed(); // so that the first question takes the fleet in
        let state = State {
            fleet: seen,
            seen: Fleet::default(),
            dispatcher: Dispatcher::new(),
            channels: HashMap::new(),
            links: BTreeMap::new(),
            losses: Losses::default(),
            counted: BTreeMap::new(),
            lost: BTreeMap::new(),
            drained: BTreeMap::new(),
            digests,
            way,
        };
        let (rotation, began) = (watch::Sender::new(()), Instant::now());
        Arc::new(Self { state: Mutex::new(state), fleet, rotation, began })
    }

    /// Takes the fleet in as it changes, for ever: whoever waits for a leader that is none any more is told at once.
    pub(crate) async fn keep(&self) -> Infallible {
        let mut seen = self.watch();
        loop {
            drop(self.current());
            self.changed(&mut seen).await;
        }
    }

    /// Takes a place at the best of the groups that are wanted.
    pub(crate) fn place(self: &Arc<Self>, want: Want<'_>) -> Result<Place, Failure> {
        let mut state = self.current();
        let choice = state.dispatcher.dispatch(want, self.began.elapsed())?;
        let Some((model, link)) = state.card(&choice.group).zip(state.link(&choice.group)) else {
            state.dispatcher.finished(choice.ticket);
            state.dispatcher.lost(&choice.group, choice.epoch);
            return Err(Failure::NoGroup { model: want.model.to_owned(), begun: false });
        };
        Ok(Place {
            group: choice.group,
            epoch: choice.epoch,
            model,
            link,
            ticket: Some(choice.ticket),
            groups: self.clone(),
        })
    }

    /// Whether one of the groups that are wanted serves now.
    pub(crate) fn takes(&self, want: Want<'_>) -> bool {
        self.current().dispatcher.takes(want, self.now())
    }

    /// A request that its client has sent again begins at a place: the one of its key that runs at another group is over.
    pub(crate) fn supersede(&self, place: &Place, key: RepeatKey) {
        let mut state = self.current();
        let others = state.seen.groups.iter().filter(|(id, group)| {
            let serves = group.serving().is_some_and(|health| health.model.name == place.model.name);
            serves && **id != place.group && !state.lost.contains_key(*id)
        });
        for other in others.map(|(id, _)| id.clone()).collect::<Vec<_>>() {
            if let Some(link) = state.link(&other) {
                link.supersede(key);
            }
        }
    }

    /// Takes a group out of rotation whose leader cannot be reached, until the fleet shows a newer incarnation of
    /// it or the leader can be reached again.
    pub(crate) fn lost(self: &Arc<Self>, place: &Place) {
        let mut state = self.current();
        let newest = state.counted.entry(place.group.clone()).or_default();
        if *newest < place.epoch {
            *newest = place.epoch;
            state.losses.count(self.now());
        }
        if serving_epoch(&state.seen, &place.group) != Some(place.epoch) {
            return; // the fleet has moved on by itself; if its leader's word comes back it lives
        }
        state.dispatcher.lost(&place.group, place.epoch);
        if state.lost.insert(place.group.clone(), place.epoch) == Some(place.epoch) {
            return; // somebody else probes it already
        }
        let tie = state.links.get(&place.group);
        if tie.is_some_and(|tie| tie.health.epoch == place.epoch && tie.link.ended()) {
            state.links.remove(&place.group);
            state.take_in(); // without what this leader said of itself
        }
        self.fails(&mut state, &place.group);
        drop(state);
        tracing::warn!(group = %place.group, epoch = place.epoch.0, "a group's leader cannot be reached");
        self.rotation.send_replace(());
        let (groups, id, epoch) = (self.clone(), place.group.clone(), place.epoch);
        tokio::spawn(async move { groups.probe(&id, epoch).await });
    }

    /// Takes a group out of rotation that is drained: it ends well, and is to blame for nothing.
    pub(crate) fn drains(&self, place: &Place) {
        let mut state = self.current();
        if serving_epoch(&state.seen, &place.group) == Some(place.epoch) {
            state.dispatcher.lost(&place.group, place.epoch);
            state.drained.insert(place.group.clone(), place.epoch);
        }
    }

    /// A place's group was lost, and its ranks worked on the request and had given it so many tokens: whether that is taken for
    /// the reason.
    pub(crate) fn convicts(&self, place: &Place, suspicion: &mut Suspicion, tokens: usize) -> bool {
        suspicion.lost(tokens, place.link.suspects(suspicion.deaths()), self.now());
        suspicion.convicts(&self.current().losses)
    }

    /// A request had a token there.
    pub(crate) fn succeeded(&self, place: &Place) {
        let mut state = self.current();
        let was = state.dispatcher.breaker(&place.group, self.now());
        state.dispatcher.succeeded(&place.group);
        if was != BreakerState::Closed {
            self.rotation.send_replace(()); // the others waited for what would become of it
        }
    }

    /// A request failed there, by no fault of its client's.
    pub(crate) fn failed(self: &Arc<Self>, place: &Place) {
        self.fails(&mut self.current(), &place.group);
    }

    fn fails(self: &Arc<Self>, state: &mut State, group: &GroupId) {
        let Some(pause) = state.dispatcher.failed(group, self.began.elapsed(), random_seed()) else { return };
        tracing::warn!(%group, pause_s = pause.as_secs_f64(), "a group fails again and again: it gets no new requests");
        let groups = self.clone();
        tokio::spawn(async move {
            tokio::time::sleep(pause).await;
            groups.rotation.send_replace(()); // who waits for a group may try it
        });
    }

    /// Time since this router began, by which everything is counted that ends by itself.
    pub(crate) fn now(&self) -> Duration {
        self.began.elapsed()
    }

    /// Asks a lost leader whether it still leads that epoch, for as long as the fleet believes in it. One that can be reached and
    /// has left it is no better than one that cannot.
    async fn probe(&self, id: &GroupId, epoch: Epoch) {
        let mut fleet = self.fleet.clone();
        let gone = |fleet: &Fleet| serving_epoch(fleet, id) != Some(epoch);
        loop {
            if let Ok(moved) = timeout(PROBE_MS, fleet.wait_for(gone)).await {
                drop(moved);
                break;
            }
            let lost =
                self.leading().into_iter().find(|leading| leading.group == *id && leading.epoch == epoch);
            let Some(lost) = lost else { continue };
            if matches!(timeout(CONNECT_MS_MAX, lost.reports()).await, Ok(Ok(_))) {
                tracing::info!(group = %id, epoch = epoch.0, "a lost group's leader can be reached again");
                break;
            }
        }
        let mut state = self.current();
        if state.lost.get(id) == Some(&epoch) {
            state.lost.remove(id);
            state.dispatcher.found(id, epoch);
        }
        drop(state);
        self.rotation.send_replace(());
    }

    /// Waits until the fleet no longer shows a place's group in that incarnation; false if it does not move.
    pub(crate) async fn moved(&self, place: &Place) -> bool {
        let mut fleet = self.fleet.clone();
        let moved = fleet.wait_for(|fleet| serving_epoch(fleet, &place.group) != Some(place.epoch));
        timeout(FLEET_MOVE_MS_MAX, moved).await.is_ok_and(|moved| moved.is_ok())
    }

    /// Waits until the fleet, or what this router thinks of it, has changed. A fleet whose source has ended does
    /// not change any more.
    pub(crate) async fn changed(&self, seen: &mut Watch) {
        tokio::select! {
            Ok(()) = seen.0.changed() => {}
            Ok(()) = seen.1.changed() => {}
            else => std::future::pending().await,
        }
    }

    /// What [`changed`](Self::changed) needs: it tells of what changes from now on.
    pub(crate) fn watch(&self) -> Watch {
        let mut fleet = self.fleet.clone();
        fleet.mark_unchanged();
        (fleet, self.rotation.subscribe())
    }

    /// What the ready groups of a model agree to serve: the smallest context among them. `None` without any.
    pub(crate) fn card(&self, model: &str) -> Option<ModelCard> {
        let state = self.current();
        let ready =
            state.seen.groups.iter().filter(|(id, group)| state.standing(id, group) == Standing::Ready);
        let cards = ready.filter_map(|(_, group)| group.serving()).map(|health| &health.model);
        cards.filter(|card| card.name == model).min_by_key(|card| card.context_tokens_max).cloned()
    }

    /// The same as soon as there is one, if it is there in time.
    pub(crate) async fn card_within(&self, model: &str, time: Duration) -> Option<ModelCard> {
        let mut seen = self.watch();
        let ready = async {
            loop {
                match self.card(model) {
                    Some(card) => return card,
                    None => self.changed(&mut seen).await,
                }
            }
        };
        timeout(time, ready).await.ok()
    }

    /// The groups that serve.
    pub(crate) fn leading(&self) -> Vec<Leading> {
        let mut state = self.current();
        let fleet = state.seen.clone();
        let mut leading = Vec::new();
        for (id, group) in fleet.groups {
            let (Some(health), Some((_, record))) = (group.serving(), group.epoch.as_ref()) else { continue };
            let Ok(channel) = state.channel(&health.leader) else { continue };
            leading.push(Leading {
                group: id,
                epoch: health.epoch,
                model: health.model.name.clone(),
                leader: EngineClient::new(channel),
                secret: record.secret.clone(),
            });
        }
        leading
    }

    /// Every group, in order of their names.
    pub(crate) fn list(&self) -> Vec<Listed> {
        let (state, now) = (self.current(), self.now());
        let listed = state.seen.groups.iter().map(|(id, group)| Listed {
            id: id.clone(),
            group: group.clone(),
            standing: state.standing(id, group),
            same_weights: state.same_weights(group),
            in_flight: state.dispatcher.in_flight(id),
            breaker: state.dispatcher.breaker(id, now),
        });
        listed.collect()
    }

    /// The state, after the fleet's latest view has been taken in.
    fn current(&self) -> MutexGuard<'_, State> {
        let mut state = self.state.lock().unwrap_or_else(PoisonError::into_inner);
        if state.fleet.has_changed().unwrap_or(true) {
            state.take_in();
        }
        state
    }
}

impl State {
    fn take_in(&mut self) {
        let mut fleet = self.fleet.borrow_and_update().clone();
        self.links.retain(|id, tie| {
            let over = fleet.groups.get(id).is_some_and(|group| is_over(group, tie.health.epoch));
            if over {
                tie.link.lose();
            }
            !over
        });
        for (id, group) in &mut fleet.groups {
            let epoch = group.epoch.as_ref().map(|(epoch, _)| *epoch);
            let tie = self.links.get(id).filter(|tie| Some(tie.health.epoch) == epoch && !tie.link.ended());
            if let (None, Some(tie)) = (&group.health, tie) {
                group.health = Some(tie.health.clone()); // a lease was lost, and nothing else
            }
        }
        self.counted.retain(|id, _| fleet.groups.contains_key(id));
        for gone in [&mut self.lost, &mut self.drained] {
            gone.retain(|id, epoch| {
                let stays = serving_epoch(&fleet, id) == Some(*epoch);
                if !stays {
                    self.dispatcher.found(id, *epoch); // if its leader's word comes back it lives
                }
                stays
            });
        }
        let leads =
            |leader: &String| fleet.groups.values().any(|g| g.serving().is_some_and(|h| h.leader == *leader));
        self.channels.retain(|leader, _| leads(leader));
        self.seen = fleet;
        let usable = self.usable();
        self.dispatcher.fleet(&usable);
    }

    /// What a group serves.
    fn card(&self, id: &GroupId) -> Option<ModelCard> {
        Some(self.seen.groups.get(id)?.serving()?.model.clone())
    }

    /// The stream to the leader of a group; a new one where there is none, or where it has ended.
    fn link(&mut self, id: &GroupId) -> Option<Arc<Link>> {
        let group = self.seen.groups.get(id)?;
        let (health, (_, record)) = (group.serving()?, group.epoch.as_ref()?);
        let tie = self.links.get(id);
        let tie = tie.filter(|tie| tie.health.epoch == health.epoch && !tie.link.ended());
        if let Some(tie) = tie {
            return Some(tie.link.clone());
        }
        let (health, secret) = (health.clone(), record.secret.clone());
        let channel = self.channel(&health.leader).inspect_err(|_| {
            tracing::warn!(group = %id, leader = health.leader, "a leader's address is no address");
        });
        let leader = EngineClient::new(channel.ok()?)
            .max_decoding_message_size(GRPC_MESSAGE_BYTES_MAX)
            .max_encoding_message_size(GRPC_MESSAGE_BYTES_MAX);
        let link = Link::open(leader, health.epoch, secret);
        self.links.insert(id.clone(), Tie { health, link: link.clone() });
        Some(link)
    }

    /// The fleet as the dispatcher may see it: a leader's word does not count if its weights are not the ones that
    /// this router knows under their name.
    fn usable(&self) -> Fleet {
        let mut fleet = self.seen.clone();
        for group in fleet.groups.values_mut() {
            if !self.same_weights(group) {
                group.health = None;
            }
        }
        fleet
    }

    fn same_weights(&self, group: &Group) -> bool {
        let Some(health) = &group.health else { return true };
        self.digests.get(&health.model.name).is_none_or(|digest| *digest == health.model.digest)
    }

    fn standing(&self, id: &GroupId, group: &Group) -> Standing {
        match Standing::of(group, !self.lost.contains_key(id) && self.same_weights(group)) {
            Standing::Ready if self.drained.contains_key(id) => Standing::Draining,
            standing => standing,
        }
    }

    fn channel(&mut self, leader: &str) -> Result<Channel, tonic::transport::Error> {
        if let Some(channel) = self.channels.get(leader) {
            return Ok(channel.clone());
        }
        let channel = self.way.connect_lazy(&endpoint(leader)?);
        self.channels.insert(leader.to_owned(), channel.clone());
        Ok(channel)
    }
}

fn endpoint(leader: &str) -> Result<Endpoint, tonic::transport::Error> {
    Ok(Endpoint::from_shared(format!("http://{leader}"))?
        .connect_timeout(CONNECT_MS_MAX)
        .tcp_nodelay(true)
        .http2_keep_alive_interval(PING_MS)
        .keep_alive_timeout(PONG_MS_MAX)
        .keep_alive_while_idle(true)
        .initial_stream_window_size(LINK_WINDOW_BYTES)
        .initial_connection_window_size(LINK_WINDOW_BYTES))
}

/// Whether nobody works on that epoch any more. A member that is merely not registered says nothing of it.
fn is_over(group: &Group, epoch: Epoch) -> bool {
    let last = group.epoch.as_ref().map(|(last, _)| *last);
    last.is_some_and(|last| last > epoch || (last == epoch && !group.stands()))
}

fn serving_epoch(fleet: &Fleet, id: &GroupId) -> Option<Epoch> {
    fleet.groups.get(id).and_then(Group::serving).map(|health| health.epoch)
}
