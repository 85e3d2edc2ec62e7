//! A source of decisions: splitmix64, so that a seed means the same everywhere and for ever.

/// See the [module documentation](self).
#[derive(Clone, Debug)]
pub struct Dice(u64);

impl Dice {
    #[must_use]
    pub const fn new(seed: u64) -> Self {
        Self(seed)
    }

    /// A number below `sides`.
    pub const fn roll(&mut self, sides: u64) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        (z ^ (z >> 31)) % sides
    }

    pub const fn one_in(&mut self, sides: u64) -> bool {
        self.roll(sides) == 0
    }

    /// One of a list that is not empty.
    pub fn pick<T: Clone>(&mut self, of: &[T]) -> T {
        of[self.roll(of.len() as u64) as usize].clone()
    }

    /// None up to `at_most`, with repeats.
    pub fn some<T: Clone>(&mut self, of: &[T], at_most: u64) -> Vec<T> {
        (0..self.roll(at_most + 1)).map(|_| self.pick(of)).collect()
    }
}
