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

/// `FeatureDetectOverride`: features that the operator knows better.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Overrides {
    pub snat_random_fully: Option<bool>,
    pub masquerade_random_fully: Option<bool>,
    pub nflog_size: Option<bool>,
    pub restore_supports_lock: Option<bool>,
}

/// Names of the reference that have no meaning for what we do.
const WITHOUT_EFFECT: [&str; 5] =
    ["ChecksumOffloadBroken", "IPIPDeviceIsL3", "KernelSideRouteFiltering", "KernelHasUDPGSOFix", "NFTablesSupported"];

impl Overrides {
    /// Reads names, exactly as the reference spells them, and values; also returns what is wrong with some.
    pub fn parse<'a>(pairs: impl IntoIterator<Item = (&'a str, &'a str)>) -> (Self, Vec<String>) {
        let mut overrides = Self::default();
        let mut complaints = Vec::new();
        for (name, value) in pairs {
            let value = match value.trim().to_ascii_lowercase().as_str() {
                "true" | "t" | "1" => true,
                "false" | "f" | "0" => false,
                _ => {
                    complaints.push(format!("{name}={value}: neither true nor false"));
                    continue;
                }
            };
            let place = match name {
                "SNATFullyRandom" => &mut overrides.snat_random_fully,
                "MASQFullyRandom" => &mut overrides.masquerade_random_fully,
                "NFLogSize" => &mut overrides.nflog_size,
                "RestoreSupportsLock" => &mut overrides.restore_supports_lock,
                name => {
                    if !WITHOUT_EFFECT.contains(&name) {
                        complaints.push(format!("{name}: no such feature"));
                    }
                    continue;
                }
            };
            *place = Some(value);
        }
        (overrides, complaints)
    }

    /// Returns what counts, given what was detected.
    #[must_use]
    pub fn apply(&self, detected: Features) -> Features {
        let Self { snat_random_fully, masquerade_random_fully, nflog_size, restore_supports_lock } = *self;
        Features {
            snat_random_fully: snat_random_fully.unwrap_or(detected.snat_random_fully),
            masquerade_random_fully: masquerade_random_fully.unwrap_or(detected.masquerade_random_fully),
            nflog_size: nflog_size.unwrap_or(detected.nflog_size),
            restore_supports_lock: restore_supports_lock.unwrap_or(detected.restore_supports_lock),
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
    fn overrides_count_more_than_what_was_detected() {
        let pairs = [
            ("SNATFullyRandom", "false"),
            ("NFLogSize", "0"),
            ("RestoreSupportsLock", "maybe"),
            ("KernelSideRouteFiltering", "true"),
            ("masqFullyRandom", "false"),
        ];
        let (overrides, complaints) = Overrides::parse(pairs);
        let all = Features::default();
        assert_eq!(overrides.apply(all), Features { snat_random_fully: false, nflog_size: false, ..all });
        assert_eq!(
            complaints,
            ["RestoreSupportsLock=maybe: neither true nor false", "masqFullyRandom: no such feature"]
        );
        let none = Features::of("", "", false);
        let (overrides, _) = Overrides::parse([("MASQFullyRandom", "true"), ("RestoreSupportsLock", "T")]);
        let expected = Features { masquerade_random_fully: true, restore_supports_lock: true, ..none };
        assert_eq!(overrides.apply(none), expected);
    }

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
