//! The coordinator's decisions, played through with a clock of our own.

use stoa_metastore::{LeftOut, LoadRequest, PartPointer, PlanTarget, TableState, table_version};

use super::*;
use crate::memory::Basis;

const SETTINGS: DecideSettings = DecideSettings {
    grace_ms: 60_000,
    settle_ms: 1_000,
    reserve_ratio: 0.0,
};
const RETRY: (u64, u64) = (1_000, 60_000);

/// A metastore and a shell in miniature: actions happen at once.
struct World {
    memory: Memory,
    view: View,
    now_ms: u64,
    revision: i64,
    /// Bytes of every table on every worker, as estimated.
    bytes: u64,
    /// Names the files of every table, as they are found when they are read.
    files: String,
}

impl World {
    fn new(workers: &[&str]) -> World {
        let mut world = World {
            memory: Memory::new(),
            view: View::default(),
            now_ms: 0,
            revision: 0,
            bytes: 100,
            files: String::new(),
        };
        workers.iter().for_each(|id| world.join(id, 1_000));
        world.decide();
        world.now_ms += SETTINGS.settle_ms;
        world
    }

    fn join(&mut self, id: &str, capacity_bytes: u64) {
        let record = WorkerRecord {
            id: id.to_owned(),
            capacity_bytes,
            ..Default::default()
        };
        self.view.workers.insert(id.to_owned(), record);
        self.view.states.insert(
            id.to_owned(),
            WorkerState {
                id: id.to_owned(),
                ..Default::default()
            },
        );
    }

    fn leave(&mut self, id: &str) {
        self.view.workers.remove(id);
        self.view.states.remove(id);
    }

    fn request(&mut self, text: &str) {
        self.revision += 1;
        let request: LoadRequest = text.parse().unwrap();
        self.view.requests.insert(
            request.table.clone(),
            Requested {
                request,
                revision: self.revision,
            },
        );
    }

    fn decide(&mut self) -> Decision {
        decide(&mut self.memory, &self.view, &SETTINGS, self.now_ms)
    }

    /// Decides and carries out until nothing is left to do; what was done, without loads.
    fn run(&mut self) -> Vec<Action> {
        let mut done = Vec::new();
        for _ in 0..100 {
            let actions = self.decide().actions;
            if actions.is_empty() {
                return done;
            }
            for action in actions {
                self.carry_out(&action);
                if !matches!(action, Action::LoadCatalog { .. }) {
                    done.push(action);
                }
            }
        }
        panic!("never comes to rest: {done:?}");
    }

    fn carry_out(&mut self, action: &Action) {
        match action {
            Action::LoadCatalog { table, version } => {
                self.memory.catalog_loading(table, *version);
                self.memory
                    .catalog_loaded(table, *version, BTreeSet::from(["arrow"]));
            }
            Action::WritePlan {
                table,
                version,
                why,
                workers,
                correction,
            } => {
                let ids = || workers.iter().map(|worker| worker.id.clone());
                let plan = CacheVersion {
                    table_version: table_version(table, *version),
                    plan: self.next(table),
                    parts: ids().map(|id| (id, PartPointer::default())).collect(),
                    ..CacheVersion::default()
                };
                let basis = Basis {
                    plan: plan.plan,
                    capacities: self.memory.capacities(),
                    raw_bytes: ids().map(|id| (id, self.bytes)).collect(),
                    room_bytes: self
                        .memory
                        .room_for(table, &self.view, SETTINGS.reserve_ratio),
                    correction: *correction,
                    files: self.files.clone(),
                    ..Basis::default()
                };
                self.view.in_force.insert(table.clone(), plan);
                self.memory.planned(table, *version, basis, Some(why));
            }
            Action::WriteUnloaded { table, version } => {
                let plan = CacheVersion {
                    table_version: table_version(table, *version),
                    plan: self.next(table),
                    unloaded: true,
                    ..CacheVersion::default()
                };
                self.view.in_force.insert(table.clone(), plan);
                self.memory.unloaded(table);
            }
            Action::Adopt { table } => {
                let plan = self.view.in_force[table].clone();
                let raw_bytes = plan
                    .parts
                    .keys()
                    .map(|id| (id.clone(), self.bytes))
                    .collect();
                let basis = Basis {
                    plan: plan.plan,
                    raw_bytes,
                    correction: 1.0,
                    ..Basis::default()
                };
                self.memory
                    .planned(table, plan.version().unwrap(), basis, None);
            }
            Action::Prune { table } => self.memory.pruned(table, self.view.in_force[table].plan),
            Action::Reject { .. } => {}
        }
    }

    fn next(&self, table: &str) -> u64 {
        let states: Vec<WorkerState> = self.view.states.values().cloned().collect();
        stoa_metastore::next_plan(table, self.view.in_force.get(table), &states)
    }

    /// All live workers of the table's plan are done with it.
    fn report(&mut self, table: &str, bytes_done: u64, left_out: LeftOut) {
        let plan = &self.view.in_force[table];
        let target = Some(plan.target().unwrap());
        for worker in plan.parts.keys() {
            if let Some(state) = self.view.states.get_mut(worker) {
                let table_state = TableState {
                    target,
                    chunks_total: 10,
                    chunks_done: 10 - left_out.chunks,
                    bytes_done,
                    left_out: left_out.clone(),
                    ..TableState::default()
                };
                state.tables.insert(table.to_owned(), table_state);
            }
        }
    }
}

fn planned(actions: &[Action]) -> Vec<(&str, u64, &Why)> {
    let planned = actions.iter().filter_map(|action| match action {
        Action::WritePlan {
            table,
            version,
            why,
            ..
        } => Some((table.as_str(), *version, why)),
        _ => None,
    });
    planned.collect()
}

fn workers_of(actions: &[Action]) -> &[PlanWorker] {
    let workers = actions.iter().rev().find_map(|action| match action {
        Action::WritePlan { workers, .. } => Some(workers),
        _ => None,
    });
    workers.expect("a plan")
}

#[test]
fn a_request_is_planned_once_the_workers_have_settled() {
    let mut world = World::new(&[]);
    world.request("a.b:1");
    assert_eq!(world.decide().waiting["a.b"], "no worker is live");
    world.join("w1", 1_000);
    let decision = world.decide();
    assert_eq!(decision.actions, []);
    assert_eq!(decision.wake_ms, Some(world.now_ms + 1_000));
    world.now_ms += 999;
    world.join("w2", 1_000);
    assert_eq!(world.decide().wake_ms, Some(world.now_ms + 1_000));
    world.now_ms += 1_000;
    assert_eq!(
        world.decide().actions,
        [Action::LoadCatalog {
            table: "a.b".into(),
            version: 1
        }]
    );
    let done = world.run();
    assert_eq!(planned(&done), [("a.b", 1, &Why::NewVersion)]);
    assert_eq!(workers_of(&done).len(), 2);
    // And then there is peace.
    assert_eq!(world.run(), []);
}

#[test]
fn of_versions_that_arrive_during_a_load_the_last_is_planned() {
    let mut world = World::new(&["w1"]);
    world.request("a.b:5");
    let load = world.decide().actions;
    assert_eq!(
        load,
        [Action::LoadCatalog {
            table: "a.b".into(),
            version: 5
        }]
    );
    world.memory.catalog_loading("a.b", 5);
    world.request("a.b:6");
    world.request("a.b:7");
    let load = world.decide().actions;
    assert_eq!(
        load,
        [Action::LoadCatalog {
            table: "a.b".into(),
            version: 7
        }]
    );
    // The footers of 5 arrive after all, and nobody needs them.
    world.memory.catalog_loaded("a.b", 5, BTreeSet::new());
    assert_eq!(planned(&world.run()), [("a.b", 7, &Why::NewVersion)]);
}

#[test]
fn a_worker_that_comes_back_within_its_grace_costs_no_plan() {
    let mut world = World::new(&["w1", "w2"]);
    world.request("a.b:1");
    world.run();
    world.leave("w2");
    assert_eq!(world.run(), []);
    world.now_ms += 59_000;
    let decision = world.decide();
    assert_eq!(decision.actions, []);
    assert_eq!(decision.wake_ms, Some(world.now_ms + 1_000));
    world.join("w2", 1_000);
    assert_eq!(world.run(), []);
    // Flapping again and again is no reason either.
    for _ in 0..10 {
        world.leave("w2");
        assert_eq!(world.run(), []);
        world.now_ms += 50_000;
        world.join("w2", 1_000);
        assert_eq!(world.run(), []);
        world.now_ms += 5_000;
    }
}

#[test]
fn a_worker_that_stays_away_is_planned_around_and_welcome_later() {
    let mut world = World::new(&["w1", "w2"]);
    world.request("a.b:1");
    world.run();
    world.leave("w2");
    world.run();
    world.now_ms += 60_000;
    let done = world.run();
    assert_eq!(planned(&done), [("a.b", 1, &Why::WorkerGone("w2".into()))]);
    assert_eq!(workers_of(&done).len(), 1);
    world.join("w2", 1_000);
    world.run();
    world.now_ms += 1_000;
    assert_eq!(
        planned(&world.run()),
        [("a.b", 1, &Why::WorkerJoined("w2".into()))]
    );
    assert_eq!(world.run(), []);
}

#[test]
fn a_version_planned_during_a_grace_leaves_the_gone_what_it_has() {
    let mut world = World::new(&["w1", "w2"]);
    world.request("a.b:1");
    world.run();
    world.leave("w2");
    world.request("a.b:2");
    world.request("c.d:1");
    let done = world.run();
    let of = |name: &str| -> Vec<(String, bool)> {
        let workers = done.iter().find_map(|action| match action {
            Action::WritePlan { table, workers, .. } if table == name => Some(workers),
            _ => None,
        });
        workers
            .unwrap()
            .iter()
            .map(|worker| (worker.id.clone(), worker.accepts_new))
            .collect()
    };
    assert_eq!(
        of("a.b"),
        [("w1".to_owned(), true), ("w2".to_owned(), false)]
    );
    // It never had anything of the other table.
    assert_eq!(of("c.d"), [("w1".to_owned(), true)]);
}

#[test]
fn tables_share_the_capacity_first_come_first_served() {
    let mut world = World::new(&["w1"]);
    world.bytes = 600;
    world.request("z.first:1");
    world.request("a.second:1");
    let done = world.run();
    assert_eq!(
        planned(&done).iter().map(|p| p.0).collect::<Vec<_>>(),
        ["z.first", "a.second"]
    );
    assert_eq!(workers_of(&done)[0].capacity_bytes, 400);
    // Its own share is not taken from a table's next version.
    world.request("z.first:2");
    world.bytes = 300;
    assert_eq!(workers_of(&world.run())[0].capacity_bytes, 400);
}

#[test]
fn a_new_coordinator_asks_what_others_hold_before_it_plans_and_not_otherwise() {
    let mut world = World::new(&["w1"]);
    world.request("a.b:1");
    world.request("c.d:1");
    world.run();
    // Another process takes over, and remembers nothing.
    world.memory = Memory::new();
    world.decide();
    world.now_ms += 1_000;
    assert_eq!(
        world.run(),
        [],
        "nothing to plan: nothing is asked of the origin"
    );
    world.request("c.d:2");
    let done = world.run();
    assert_eq!(
        done[0],
        Action::Adopt {
            table: "a.b".into()
        }
    );
    assert_eq!(planned(&done), [("c.d", 2, &Why::NewVersion)]);
    assert_eq!(workers_of(&done)[0].capacity_bytes, 900);
}

#[test]
fn another_table_that_cannot_be_read_does_not_block() {
    let mut world = World::new(&["w1"]);
    world.request("a.b:1");
    world.run();
    world.report("a.b", 700, LeftOut::default());
    world
        .view
        .states
        .get_mut("w1")
        .unwrap()
        .tables
        .get_mut("a.b")
        .unwrap()
        .bytes_total = 700;
    world.memory = Memory::new();
    world.decide();
    world.now_ms += 1_000;
    world
        .memory
        .failed("a.b", 1, "gone".into(), true, RETRY, world.now_ms);
    world.request("c.d:1");
    // What the worker says of it will do.
    assert_eq!(workers_of(&world.run())[0].capacity_bytes, 300);
}

#[test]
fn what_fails_is_tried_again_ever_more_slowly() {
    let mut world = World::new(&["w1"]);
    world.request("a.b:1");
    let mut pauses = Vec::new();
    for _ in 0..8 {
        let actions = world.decide().actions;
        assert_eq!(
            actions,
            [Action::LoadCatalog {
                table: "a.b".into(),
                version: 1
            }]
        );
        world.memory.catalog_loading("a.b", 1);
        world
            .memory
            .failed("a.b", 1, "503".into(), true, RETRY, world.now_ms);
        let decision = world.decide();
        assert_eq!(decision.actions, []);
        assert_eq!(decision.waiting["a.b"], "503");
        pauses.push(decision.wake_ms.unwrap() - world.now_ms);
        world.now_ms = decision.wake_ms.unwrap();
    }
    assert_eq!(
        pauses,
        [1_000, 2_000, 4_000, 8_000, 16_000, 32_000, 60_000, 60_000]
    );
    assert_eq!(planned(&world.run()).len(), 1);
}

#[test]
fn a_layout_that_is_wrong_is_rejected_once_and_the_plan_in_force_stays() {
    let mut world = World::new(&["w1"]);
    world.request("a.b:1");
    world.run();
    world.request("a.b:2");
    world.memory.failed(
        "a.b",
        2,
        "unknown column".into(),
        false,
        RETRY,
        world.now_ms,
    );
    let done = world.run();
    let expected = Action::Reject {
        request: "a.b:2".into(),
        reason: "unknown column".into(),
        revision: world.revision,
    };
    assert_eq!(done, [expected]);
    assert_eq!(world.view.in_force["a.b"].table_version, "a.b:1");
    world.now_ms += 60_000;
    world.memory.failed(
        "a.b",
        2,
        "unknown column".into(),
        false,
        RETRY,
        world.now_ms,
    );
    assert_eq!(world.run(), []);
    // A version that is right again is not held back by the one before.
    world.request("a.b:3");
    assert_eq!(planned(&world.run()), [("a.b", 3, &Why::NewVersion)]);
}

/// Whoever asks again for what was refused has put something right, or wants to know what is wrong:
/// it is tried at once, and refused anew where that is due.
#[test]
fn what_was_refused_is_tried_again_when_it_is_asked_for_again() {
    let mut world = World::new(&["w1"]);
    let no_files = |world: &mut World| {
        world.memory.catalog_loading("a.b", 1);
        let (now_ms, reason) = (world.now_ms, "no files".into());
        world.memory.failed("a.b", 1, reason, false, RETRY, now_ms);
    };
    let refused = |done: &[Action]| -> Vec<i64> {
        let refused = done.iter().filter_map(|action| match action {
            Action::Reject { revision, .. } => Some(*revision),
            _ => None,
        });
        refused.collect()
    };
    world.request("a.b:1");
    assert_eq!(world.decide().actions.len(), 1);
    no_files(&mut world);
    assert_eq!(refused(&world.run()), [1]);
    world.request("a.b:1");
    let read = Action::LoadCatalog {
        table: "a.b".into(),
        version: 1,
    };
    assert_eq!(world.decide().actions, [read]);
    no_files(&mut world);
    assert_eq!(refused(&world.run()), [2]);
    world.request("a.b:1");
    assert_eq!(planned(&world.run()), [("a.b", 1, &Why::NewVersion)]);
}

/// After a reset nothing says that a table is to be dropped, and nothing that it is to be held.
/// Workers keep it until somebody asks for it to be dropped.
#[test]
fn what_is_held_without_a_plan_is_dropped_when_that_is_asked_for() {
    let mut world = World::new(&["w1"]);
    world.request("a.b:7");
    world.run();
    world.report("a.b", 100, LeftOut::default());
    for table in world.view.states.get_mut("w1").unwrap().tables.values_mut() {
        table.held_bytes = 100;
    }
    (world.view.requests, world.view.in_force) = Default::default();
    assert_eq!(world.run(), []);
    // The least version, for what is published next begins there.
    world.request("a.b:1 unloaded");
    let dropped = Action::WriteUnloaded {
        table: "a.b".into(),
        version: 1,
    };
    assert_eq!(world.run()[..1], [dropped]);
    // Under a number that the worker follows.
    assert_eq!(world.view.in_force["a.b"].plan, 2);
    // What nobody holds needs no such word.
    world.request("a.c:1 unloaded");
    assert_eq!(planned(&world.run()), []);
    assert!(!world.view.in_force.contains_key("a.c"));
}

#[test]
fn requests_that_went_around_the_rules_are_rejected() {
    let mut world = World::new(&["w1"]);
    world.request("a.b:3");
    world.run();
    world.request("a.b:2");
    world.view.unreadable.push(Unreadable {
        text: "what".into(),
        reason: "no version".into(),
        revision: 77,
    });
    let rejected = |actions: &[Action]| -> Vec<(String, String)> {
        let rejected = actions.iter().map(|action| match action {
            Action::Reject {
                request, reason, ..
            } => (request.clone(), reason.clone()),
            other => panic!("{other:?}"),
        });
        rejected.collect()
    };
    let done = world.run();
    assert_eq!(
        rejected(&done),
        [
            ("what".to_owned(), "no version".to_owned()),
            (
                "a.b:2".to_owned(),
                "stale layout version of a.b: current is 3, given 2; publish the content as version 4 or later".to_owned()
            ),
        ]
    );
    assert_eq!(world.run(), []);
}

#[test]
fn unloading_frees_the_room_and_loading_again_is_a_new_plan() {
    let mut world = World::new(&["w1"]);
    world.request("a.b:1");
    world.request("c.d:1");
    world.run();
    world.request("a.b:1 unloaded");
    assert_eq!(
        world.run(),
        [
            Action::WriteUnloaded {
                table: "a.b".into(),
                version: 1
            },
            Action::Prune {
                table: "a.b".into()
            }
        ]
    );
    assert_eq!(world.memory.room_on("c.d", "w1", &world.view, 0.0), 1_000);
    world.request("a.b:1");
    assert_eq!(planned(&world.run()), [("a.b", 1, &Why::NewVersion)]);
}

#[test]
fn overflow_corrects_the_sizes_and_plans_again_but_not_for_ever() {
    let mut world = World::new(&["w1", "w2"]);
    world.request("a.b:1");
    world.run();
    // Estimated at 100 a worker; 60 of them turned out to be 120, and 40 did not fit.
    let left_out = LeftOut {
        chunks: 4,
        bytes: 40,
        reason: Some("full".into()),
        ..LeftOut::default()
    };
    world.report("a.b", 120, left_out.clone());
    let done = world.run();
    assert_eq!(planned(&done), [("a.b", 1, &Why::SizesCorrected)]);
    let Action::WritePlan { correction, .. } = &done[0] else {
        panic!("{done:?}")
    };
    assert_eq!(*correction, 2.0);
    // Half done is no reason to think again.
    world.report("a.b", 500, left_out.clone());
    world
        .view
        .states
        .get_mut("w2")
        .unwrap()
        .tables
        .get_mut("a.b")
        .unwrap()
        .chunks_done = 1;
    assert_eq!(planned(&world.run()), []);
    // Every report finds chunks still larger; at some point it has to be good enough.
    let mut plans = 0;
    for round in 0..20u64 {
        world.report("a.b", 200 << round.min(4), left_out.clone());
        plans += planned(&world.run()).len();
    }
    assert!(plans <= 4, "{plans}");
}

#[test]
fn estimates_that_were_too_high_let_more_in() {
    let mut world = World::new(&["w1"]);
    world.request("a.b:1");
    world.run();
    let plan = world.view.in_force["a.b"].plan;
    let basis = world.memory.table("a.b").basis(plan).unwrap().clone();
    world.memory.planned(
        "a.b",
        1,
        Basis {
            left_out_chunks: 5,
            left_out_bytes: 50,
            ..basis
        },
        None,
    );
    world.report("a.b", 50, LeftOut::default());
    assert_eq!(planned(&world.run()), [("a.b", 1, &Why::SizesCorrected)]);
}

#[test]
fn room_that_another_table_frees_is_used_for_what_was_left_out() {
    let mut world = World::new(&["w1"]);
    world.bytes = 900;
    world.request("a.b:1");
    world.request("c.d:1");
    world.run();
    let plan = world.view.in_force["c.d"].plan;
    let basis = world.memory.table("c.d").basis(plan).unwrap().clone();
    assert_eq!(basis.room_bytes, 100);
    world.memory.planned(
        "c.d",
        1,
        Basis {
            left_out_chunks: 5,
            ..basis
        },
        None,
    );
    assert_eq!(world.run(), []);
    world.request("a.b:1 unloaded");
    assert_eq!(planned(&world.run()), [("c.d", 1, &Why::RoomFreed)]);
    assert_eq!(world.run(), []);
}

#[test]
fn capacities_that_change_are_followed_when_it_matters() {
    let mut world = World::new(&["w1", "w2"]);
    world.request("a.b:1");
    world.run();
    let mut change = |capacity: u64| {
        world.join("w2", capacity);
        let done = world.run();
        planned(&done)
            .into_iter()
            .map(|(_, _, why)| why.clone())
            .collect::<Vec<_>>()
    };
    assert_eq!(change(990), []);
    assert_eq!(change(1_100), []);
    assert_eq!(change(2_000), [Why::CapacityChanged("w2".into())]);
    assert_eq!(change(1_900), []);
    // It holds 100, which does not fit any more.
    assert_eq!(change(50), [Why::CapacityChanged("w2".into())]);
    assert_eq!(change(50), []);
}

#[test]
fn a_worker_says_itself_when_it_finds_less_room() {
    let mut world = World::new(&["w1"]);
    world.view.states.get_mut("w1").unwrap().capacity_bytes = 300;
    world.request("a.b:1");
    assert_eq!(workers_of(&world.run())[0].capacity_bytes, 300);
}

#[test]
fn plans_are_pruned_once_everybody_has_reported() {
    let mut world = World::new(&["w1", "w2"]);
    world.request("a.b:1");
    let has_pruned = |actions: &[Action]| {
        actions.contains(&Action::Prune {
            table: "a.b".into(),
        })
    };
    assert!(!has_pruned(&world.run()));
    world.report("a.b", 100, LeftOut::default());
    world.view.states.get_mut("w2").unwrap().tables.clear();
    assert!(!has_pruned(&world.run()));
    let target = Some(PlanTarget {
        plan: world.view.in_force["a.b"].plan,
        version: 1,
    });
    let state = TableState {
        target,
        ..TableState::default()
    };
    world
        .view
        .states
        .get_mut("w2")
        .unwrap()
        .tables
        .insert("a.b".into(), state);
    assert!(has_pruned(&world.run()));
    assert!(!has_pruned(&world.run()), "once is enough");
}

#[test]
fn a_frozen_metastore_is_not_believed() {
    let mut world = World::new(&["w1"]);
    world.request("a.b:1");
    world.view.frozen = Some("went back".into());
    assert_eq!(world.decide(), Decision::default());
    world.view.frozen = None;
    assert_eq!(planned(&world.run()).len(), 1);
}

#[test]
fn workers_that_cannot_make_the_forms_are_passed_over() {
    let mut world = World::new(&["w1", "w2"]);
    world.view.workers.get_mut("w1").unwrap().formats = vec!["parquet".into()];
    world.view.workers.get_mut("w2").unwrap().formats = vec!["arrow".into(), "parquet".into()];
    world.request("a.b:1");
    let done = world.run();
    assert_eq!(
        workers_of(&done)
            .iter()
            .map(|w| w.id.as_str())
            .collect::<Vec<_>>(),
        ["w2"]
    );
    assert_eq!(world.run(), []);
}

#[test]
fn after_everybody_left_the_plan_waits_for_them() {
    let mut world = World::new(&["w1", "w2"]);
    world.request("a.b:1");
    world.run();
    world.leave("w1");
    world.leave("w2");
    world.run();
    world.now_ms += 600_000;
    assert_eq!(world.run(), []);
    world.join("w1", 1_000);
    world.join("w2", 1_000);
    world.run();
    world.now_ms += 1_000;
    assert_eq!(world.run(), [], "they are as they were: nothing to plan");
}

/// What a worker saw of a table's files at its last look.
fn sees(world: &mut World, worker: &str, files: &str) {
    let plan = &world.view.in_force["a.b"];
    let target = plan.target().unwrap();
    let state = world.view.states.get_mut(worker).unwrap();
    let table = state.tables.entry("a.b".to_owned()).or_default();
    table.target = Some(target);
    files.clone_into(&mut table.files);
}

#[test]
fn files_that_changed_are_planned_anew_once_for_everybody_who_sees_it() {
    let mut world = World::new(&["w1", "w2"]);
    world.files = "old".to_owned();
    world.request("a.b:1");
    world.run();
    for worker in ["w1", "w2"] {
        sees(&mut world, worker, "old");
    }
    assert_eq!(planned(&world.run()), [], "they see what was planned");

    world.files = "new".to_owned();
    sees(&mut world, "w1", "new");
    let plans = |done: &[Action]| planned(done).len();
    let done = world.run();
    let why = Why::FilesChanged("w1".into());
    assert_eq!(planned(&done).first(), Some(&("a.b", 1, &why)));
    // The other has not looked yet; that its files are not those of the new plan is looked into
    // once, and then it is left in peace.
    assert!(plans(&done) <= 2, "{done:?}");
    assert_eq!(planned(&world.run()), []);
    sees(&mut world, "w2", "new");
    assert_eq!(planned(&world.run()), [], "what it sees is planned already");

    // As it was before: that too is a change.
    world.files = "old".to_owned();
    sees(&mut world, "w2", "old");
    assert!(plans(&world.run()) >= 1);
    sees(&mut world, "w1", "old");
    assert_eq!(planned(&world.run()), []);
}

#[test]
fn a_worker_that_speaks_of_another_version_says_nothing_about_this_one() {
    let mut world = World::new(&["w1"]);
    world.files = "one".to_owned();
    world.request("a.b:1");
    world.run();
    sees(&mut world, "w1", "one");
    world.files = "two".to_owned();
    world.request("a.b:2");
    assert_eq!(planned(&world.run()), [("a.b", 2, &Why::NewVersion)]);
    assert_eq!(
        planned(&world.run()),
        [],
        "its report is of version 1 still"
    );
}

/// etcd was restored: it shows an older plan than the workers follow, and they will not go back.
#[test]
fn a_plan_that_workers_have_overtaken_is_written_again_under_a_later_number() {
    let mut world = World::new(&["w1", "w2"]);
    world.request("a.b:1");
    world.run();
    let later = PlanTarget {
        plan: 41,
        version: 2,
    };
    let state = world.view.states.get_mut("w2").unwrap();
    state.tables.entry("a.b".to_owned()).or_default().target = Some(later);
    let done = world.run();
    let why = Why::Overtaken("w2".into());
    assert_eq!(planned(&done), [("a.b", 1, &why)]);
    assert_eq!(world.view.in_force["a.b"].plan, 42);
    assert_eq!(planned(&world.run()), []);

    // That a table is to be dropped has to be heard as well.
    world.request("a.b:1 unloaded");
    world.run();
    assert!(world.view.in_force["a.b"].unloaded);
    let state = world.view.states.get_mut("w1").unwrap();
    let later = PlanTarget {
        plan: 60,
        version: 1,
    };
    state.tables.entry("a.b".to_owned()).or_default().target = Some(later);
    world.run();
    assert!(world.view.in_force["a.b"].unloaded);
    assert_eq!(world.view.in_force["a.b"].plan, 61);
}
