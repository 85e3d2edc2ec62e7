//! Mark bits (netfilter.md 2.1).

/// The bits of the packet mark that we use.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Marks {
    /// The packet was allowed.
    pub accept: u32,
    /// Policy left the packet to the next tier.
    pub pass: u32,
    /// Policy denied the packet; set right before the verdict.
    pub drop: u32,
    pub scratch0: u32,
    pub scratch1: u32,
    /// 0 unless WireGuard is on.
    pub wireguard: u32,
    /// Mask of the endpoint number (IPVS).
    pub endpoint: u32,
    /// Lowest endpoint bit; means "not one of our endpoints" (IPVS).
    pub non_cali: u32,
}

/// Why a mask has too few bits.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum MarkError {
    #[error("mark mask {mask:#x} has {bits} bits; at least {needed} are needed for policy{}",
        if *wireguard { " and WireGuard" } else { "" })]
    TooFewBits { mask: u32, bits: u32, needed: u32, wireguard: bool },
    #[error(
        "mark mask {mask:#x} has no bit left for endpoint marks, which IPVS needs; at least {needed} bits are needed"
    )]
    NoEndpointBits { mask: u32, needed: u32 },
}

/// Hands out the set bits of a mask from the lowest upwards.
struct Bits(u32);

impl Bits {
    /// The lowest remaining bit, or 0.
    fn next(&mut self) -> u32 {
        let bit = self.0 & self.0.wrapping_neg();
        self.0 &= !bit;
        bit
    }
}

impl Marks {
    /// Bits that policy needs whatever else is on.
    const POLICY_BITS: u32 = 5;

    /// Hands out the bits of `mask`, in an order that is the same in every release.
    ///
    /// # Errors
    ///
    /// If the mask has too few bits for what is turned on.
    pub fn allocate(mask: u32, wireguard: bool, ipvs: bool) -> Result<Self, MarkError> {
        let needed = Self::POLICY_BITS + u32::from(wireguard);
        let bits = mask.count_ones();
        if bits < needed {
            return Err(MarkError::TooFewBits { mask, bits, needed, wireguard });
        }
        if ipvs && bits == needed {
            return Err(MarkError::NoEndpointBits { mask, needed: needed + 1 });
        }
        let mut bits = Bits(mask);
        Ok(Self {
            accept: bits.next(),
            pass: bits.next(),
            drop: bits.next(),
            scratch0: bits.next(),
            scratch1: bits.next(),
            wireguard: if wireguard { bits.next() } else { 0 },
            endpoint: bits.0,
            non_cali: bits.next(),
        })
    }

    /// What is cleared at the start of a packet's way; marks of other programs are not trusted.
    /// The drop, WireGuard and endpoint bits are not in it (rule 1).
    pub const fn all(&self) -> u32 {
        self.accept | self.pass | self.scratch0 | self.scratch1
    }

    /// The bits in which a policy leaves its verdict (9.4).
    pub const fn verdict(&self) -> u32 {
        self.accept | self.pass
    }
}

impl Default for Marks {
    /// The allocation for the default mask `0xffff0000`.
    fn default() -> Self {
        Self {
            accept: 0x10000,
            pass: 0x20000,
            drop: 0x40000,
            scratch0: 0x80000,
            scratch1: 0x10_0000,
            wireguard: 0,
            endpoint: 0xffe0_0000,
            non_cali: 0x20_0000,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn bits_are_handed_out_from_the_lowest_in_a_fixed_order() {
        assert_eq!(Marks::allocate(0xffff_0000, false, false), Ok(Marks::default()));
        assert_eq!(Marks::default().all(), 0x1b_0000);
        let wireguard = Marks::allocate(0xffff_0000, true, true).unwrap();
        assert_eq!((wireguard.wireguard, wireguard.endpoint, wireguard.non_cali), (0x20_0000, 0xffc0_0000, 0x40_0000));
        let narrow = Marks::allocate(0x00ff_0000, false, true).unwrap();
        assert_eq!((narrow.scratch1, narrow.endpoint, narrow.non_cali), (0x10_0000, 0xe0_0000, 0x20_0000));
        // Bits need not be neighbours.
        let sparse = Marks::allocate(0x0101_0111, false, false).unwrap();
        assert_eq!((sparse.accept, sparse.pass, sparse.scratch1, sparse.endpoint), (1, 0x10, 0x100_0000, 0));
    }

    #[test]
    fn a_mask_with_too_few_bits_is_refused_with_the_number_needed() {
        let text = |mask, wireguard, ipvs| Marks::allocate(mask, wireguard, ipvs).unwrap_err().to_string();
        assert_eq!(text(0xf0000, false, false), "mark mask 0xf0000 has 4 bits; at least 5 are needed for policy");
        assert_eq!(
            text(0x1f0000, true, false),
            "mark mask 0x1f0000 has 5 bits; at least 6 are needed for policy and WireGuard"
        );
        assert!(text(0x1f0000, false, true).ends_with("at least 6 bits are needed"));
        assert!(Marks::allocate(0x1f0000, false, false).is_ok());
    }
}
