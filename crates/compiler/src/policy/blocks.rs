//! Match blocks: alternatives that do not fit in one rule (netfilter.md 10.4).
//!
//! Each block is a run of rules before the main rule. Positive blocks are alternatives one of which must
//! match, negative blocks exclusions none of which may; together they compute "all blocks pass" in
//! scratch bit 0, which the main rule then asks for. Scratch bit 1 is "this block passes".

use ipnet::IpNet;
use model::PortRange;
use program::{Action, Match, Rule, SetName, Side};

use super::shape::Shape;
use crate::marks::Marks;

struct Blocks<'a> {
    marks: &'a Marks,
    out: &'a mut Vec<Rule>,
    started: bool,
    positive: u32,
}

/// Appends the blocks of a rule; returns whether there are any.
pub(super) fn append(shape: &Shape, marks: &Marks, out: &mut Vec<Rule>) -> bool {
    let mut blocks = Blocks { marks, out, started: false, positive: 0 };
    let halves = [(Side::Source, &shape.source), (Side::Destination, &shape.destination)];
    for (side, half) in halves {
        if half.ports_need_block() {
            blocks.positive(port_alternatives(shape, side, &half.ports, &half.named_ports));
        }
    }
    for (side, half) in halves {
        if half.nets_need_block() {
            blocks.positive(net_alternatives(side, &half.nets));
        }
    }
    for (side, half) in halves {
        if half.not_nets_need_block() {
            blocks.negative(net_alternatives(side, &half.not_nets));
        }
    }
    for (side, half) in halves {
        if half.not_ports_need_block() {
            blocks.negative(port_alternatives(shape, side, &half.not_ports, &half.not_named_ports));
        }
    }
    blocks.started
}

fn port_alternatives(shape: &Shape, side: Side, pieces: &[Vec<PortRange>], names: &[SetName]) -> Vec<Vec<Match>> {
    let protocol = || shape.protocol.clone().map(|protocol| Match::Protocol { negated: false, protocol });
    let by_number = pieces.iter().map(|piece| {
        let ports = Match::Ports { side, negated: false, ports: piece.clone() };
        protocol().into_iter().chain([ports]).collect()
    });
    let by_name = names.iter().map(|set| {
        let set = set.clone();
        vec![Match::Set { side, negated: false, set, with_port: true }]
    });
    by_number.chain(by_name).collect()
}

fn net_alternatives(side: Side, nets: &[IpNet]) -> Vec<Vec<Match>> {
    nets.iter().map(|net| vec![Match::Net { side, negated: false, net: *net }]).collect()
}

impl Blocks<'_> {
    fn start(&mut self, initial: u32) {
        if !self.started {
            let mask = self.marks.scratch0 | self.marks.scratch1;
            self.out.push(Rule::new(Vec::new(), Action::SetMaskedMark { value: initial, mask }));
            self.started = true;
        }
    }

    fn positive(&mut self, alternatives: Vec<Vec<Match>>) {
        let Marks { scratch0: all, scratch1: this, .. } = *self.marks;
        self.start(0);
        if self.positive >= 2 {
            // Left over from the block before, and would satisfy this one (defect D1).
            self.out.push(Rule::new(Vec::new(), Action::ClearMark(this)));
        }
        // The first block may write its result straight into "all pass".
        let target = if self.positive == 0 { all } else { this };
        self.out.extend(alternatives.into_iter().map(|matches| Rule::new(matches, Action::SetMark(target))));
        if self.positive > 0 {
            self.out.push(Rule::new(vec![Match::MarkClear(this)], Action::ClearMark(all)));
        }
        self.positive += 1;
    }

    fn negative(&mut self, exclusions: Vec<Vec<Match>>) {
        let all = self.marks.scratch0;
        self.start(all);
        self.out.extend(exclusions.into_iter().map(|matches| Rule::new(matches, Action::ClearMark(all))));
    }
}
