//! Mark bits (netfilter.md 2.1).

/// The bits of the packet mark that we use.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Marks {
    pub accept: u32,
    pub pass: u32,
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
