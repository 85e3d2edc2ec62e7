//! What the kernel and the tools can do (netfilter.md 18.2).

/// Features that change the text of rules or the way programs are called.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Features {
    /// `SNAT --random-fully`.
    pub snat_random_fully: bool,
    /// `MASQUERADE --random-fully`.
    pub masquerade_random_fully: bool,
    /// `NFLOG --nflog-size`; without it the older `--nflog-range`.
    pub nflog_size: bool,
    /// The restore program takes the xtables lock itself (`--wait`).
    pub restore_supports_lock: bool,
}

impl Default for Features {
    /// What every current system has.
    fn default() -> Self {
        Self { snat_random_fully: true, masquerade_random_fully: true, nflog_size: true, restore_supports_lock: true }
    }
}

impl Features {
    /// Concludes from what a program printed for `--version`, from the text of `/proc/version`, and from
    /// whether the restore program takes `--wait`. Unknown versions count as the oldest supported ones.
    pub fn of(iptables: &str, kernel: &str, restore_takes_wait: bool) -> Self {
        let iptables = version_after(iptables, "v").unwrap_or_else(|| vec![1, 4, 7]);
        let kernel = version_after(kernel, "Linux version ").unwrap_or_else(|| vec![3, 10, 0]);
        let random = kernel >= vec![3, 14, 0];
        Self {
            snat_random_fully: random && iptables >= vec![1, 6, 0],
            masquerade_random_fully: random && iptables >= vec![1, 6, 2],
            nflog_size: kernel >= vec![4, 8, 0],
            restore_supports_lock: restore_takes_wait,
        }
    }
}

/// Returns the first `a.b.c`, or `a.b.c-d`, that follows `marker`.
fn version_after(text: &str, marker: &str) -> Option<Vec<u32>> {
    text.match_indices(marker).find_map(|(at, _)| {
        let rest = text.get(at + marker.len()..)?;
        let end = rest.find(|c: char| !c.is_ascii_digit() && c != '.' && c != '-').unwrap_or(rest.len());
        let parts = rest.get(..end)?.split(['.', '-']).map_while(|part| part.parse().ok()).take(4);
        let parts: Vec<u32> = parts.collect();
        (parts.len() >= 3).then_some(parts)
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn features_follow_from_the_versions() {
        let all = Features::default();
        let none = Features {
            snat_random_fully: false,
            masquerade_random_fully: false,
            nflog_size: false,
            restore_supports_lock: false,
        };
        let old_kernel = "Linux version 3.10.0-1160.el7.x86_64 (mockbuild@x)";
        let new_kernel =
            "Linux version 6.1.0-18-amd64 (debian-kernel@lists.debian.org) (gcc-12 (Debian 12.2.0-14) 12.2.0)";
        let cases = [
            ("iptables v1.4.21", old_kernel, false, none),
            ("iptables-restore v1.8.9 (nf_tables)", new_kernel, true, all),
            ("iptables-restore v1.8.9 (legacy)", new_kernel, true, all),
            ("iptables v1.6.0", new_kernel, false, Features { snat_random_fully: true, nflog_size: true, ..none }),
            ("iptables v1.8.9", old_kernel, true, Features { restore_supports_lock: true, ..none }),
            ("iptables v1.8.9", "Linux version 3.14.0", true, Features { nflog_size: false, ..all }),
            ("iptables v1.8.9", "Linux version 4.8.0", true, all),
            ("nonsense", "nonsense", false, none),
            ("", "", false, none),
        ];
        for (iptables, kernel, takes_wait, expected) in cases {
            assert_eq!(Features::of(iptables, kernel, takes_wait), expected, "{iptables} {kernel}");
        }
    }
}
