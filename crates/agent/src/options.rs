//! One small options struct per consumer, built from the settings.
//!
//! The only place that knows both a parameter's meaning and the type that a part wants.

use std::net::Ipv4Addr;
use std::path::PathBuf;

use anyhow::Context as _;
use compiler::{Marks, options::Failsafe};
use datastore::{ConnectOptions, Credentials};
use settings::{Connection, LogRate, PortProtocol, ProtocolPort, RateUnit, Settings, Severity};
use tracing::warn;

use crate::local::Local;

/// Options of the log on standard output, until the datastore has had its say.
pub(crate) fn early_log(local: &Local) -> telemetry::Options {
    let format = match local.resolved.settings.log_format {
        settings::LogFormat::Text => telemetry::Format::Text,
        settings::LogFormat::Json => telemetry::Format::Json,
    };
    telemetry::Options { level: level(local.early_severity), format }
}

pub(crate) const fn level(severity: Severity) -> telemetry::Level {
    match severity {
        Severity::Trace => telemetry::Level::Trace,
        Severity::Debug => telemetry::Level::Debug,
        Severity::Info => telemetry::Level::Info,
        Severity::Warning => telemetry::Level::Warn,
        // We have nothing above an error.
        Severity::Error | Severity::Fatal => telemetry::Level::Error,
        Severity::Off => telemetry::Level::Off,
    }
}

/// How the client reaches etcd.
pub(crate) fn connect(connection: &Connection) -> ConnectOptions {
    let mut options = ConnectOptions::new(connection.endpoints.iter().cloned());
    options.credentials = connection.credentials.clone().map(|(user, password)| Credentials { user, password });
    options.tls.ca = connection.ca_file.as_ref().map(PathBuf::from);
    if let Some((certificate, key)) = &connection.identity {
        options.tls.certificate = Some(PathBuf::from(certificate));
        options.tls.key = Some(PathBuf::from(key));
    }
    options
}

/// What the conversion of stored resources depends on.
pub(crate) const fn convert(settings: &Settings) -> model::convert::Options {
    model::convert::Options { allow_spoofing: settings.allow_source_spoofing }
}

/// What the compiler renders.
///
/// # Errors
///
/// If the mark mask has too few bits.
pub(crate) fn compiler(settings: &Settings) -> anyhow::Result<compiler::Options> {
    let marks = Marks::allocate(settings.mark_mask, false, false).context("IptablesMarkMask")?;
    Ok(compiler::Options {
        ipv6: settings.ipv6,
        marks,
        interface_prefixes: settings.interface_prefixes.clone(),
        openstack: settings.is_openstack(),
        metadata_address: settings.metadata_addr.parse::<Ipv4Addr>().ok(),
        metadata_port: settings.metadata_port,
        filter_allow: allow(settings.filter_allow),
        mangle_allow: allow(settings.mangle_allow),
        filter_deny: match settings.filter_deny {
            settings::DenyAction::Drop => compiler::options::DenyAction::Drop,
            settings::DenyAction::Reject => compiler::options::DenyAction::Reject,
        },
        endpoint_to_host: match settings.endpoint_to_host {
            settings::EndpointToHost::Drop => compiler::options::EndpointToHost::Drop,
            settings::EndpointToHost::Accept => compiler::options::EndpointToHost::Accept,
            settings::EndpointToHost::Return => compiler::options::EndpointToHost::Return,
        },
        check_invalid: settings.check_invalid,
        vxlan_port: settings.vxlan_port,
        allow_vxlan_from_workloads: settings.allow_vxlan_from_workloads,
        allow_ipip_from_workloads: settings.allow_ipip_from_workloads,
        kube_node_ports: settings.kube_node_ports.clone(),
        failsafe_inbound: settings.failsafe_inbound.iter().map(failsafe).collect(),
        failsafe_outbound: settings.failsafe_outbound.iter().map(failsafe).collect(),
        log_prefix: settings.log_prefix.clone(),
        log_rate: settings.log_rate.map(rate),
        log_burst: settings.log_burst,
        max_set_size: settings.max_set_size,
        route_metric_v4: settings.route_metric_v4,
        route_metric_v6: settings.route_metric_v6,
        ..compiler::Options::default()
    })
}

const fn allow(action: settings::AllowAction) -> compiler::options::AllowAction {
    match action {
        settings::AllowAction::Accept => compiler::options::AllowAction::Accept,
        settings::AllowAction::Return => compiler::options::AllowAction::Return,
    }
}

fn failsafe(port: &ProtocolPort) -> Failsafe {
    let protocol = match port.protocol {
        PortProtocol::Tcp => "tcp",
        PortProtocol::Udp => "udp",
    };
    Failsafe { protocol, port: port.port, net: port.net }
}

const fn rate(rate: LogRate) -> program::Rate {
    let per = match rate.unit {
        RateUnit::Second => program::RateUnit::Second,
        RateUnit::Minute => program::RateUnit::Minute,
        RateUnit::Hour => program::RateUnit::Hour,
        RateUnit::Day => program::RateUnit::Day,
    };
    program::Rate { count: rate.count, per }
}

/// How the drivers treat the kernel.
pub(crate) fn dataplane(settings: &Settings) -> dataplane::Options {
    let defaults = dataplane::Options::default();
    let pairs = settings.feature_overrides.iter().map(|(name, value)| (name.as_str(), value.as_str()));
    let (features, complaints) = dataplane::iptables::Overrides::parse(pairs);
    for complaint in complaints {
        warn!(parameter = "FeatureDetectOverride", complaint, "a part of the value is ignored");
    }
    dataplane::Options {
        ipv6: settings.ipv6,
        variant: match settings.backend {
            settings::Backend::Legacy => Some(dataplane::Variant::Legacy),
            settings::Backend::Nft => Some(dataplane::Variant::Nft),
            settings::Backend::Auto => None,
        },
        state_directory: Some(settings.state_directory.as_str()).filter(|path| !path.is_empty()).map(PathBuf::from),
        features,
        insert_mode: match settings.insert_mode {
            settings::InsertMode::Insert => dataplane::ChainInsertMode::Insert,
            settings::InsertMode::Append => dataplane::ChainInsertMode::Append,
        },
        interface_prefixes: settings.interface_prefixes.clone(),
        ip_forwarding: settings.ip_forwarding,
        route_protocol: settings.route_protocol,
        remove_external_routes: settings.remove_external_routes,
        table_refresh: settings.table_refresh,
        post_write_check: settings.post_write_check.unwrap_or(defaults.post_write_check),
        set_refresh: settings.set_refresh,
        largest_set: settings.max_set_size.saturating_mul(dataplane::options::LARGEST_SET_FACTOR),
        route_refresh: settings.route_refresh,
        link_refresh: settings.link_refresh,
        lock_probe: settings.lock_probe.unwrap_or(defaults.lock_probe),
        netlink_timeout: settings.netlink_timeout.unwrap_or(defaults.netlink_timeout),
        ..defaults
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use settings::{Raw, Source};

    #[test]
    fn the_default_settings_are_the_default_options_of_every_part() {
        let settings = settings(&[]);
        assert_eq!(compiler(&settings).unwrap(), compiler::Options::default());
        let of_settings = dataplane(&settings);
        // Only a host keeps state; the drivers' default has no place for it.
        let expected =
            dataplane::Options { state_directory: of_settings.state_directory.clone(), ..Default::default() };
        assert_eq!(format!("{of_settings:?}"), format!("{expected:?}"));
        assert_eq!(level(settings.log_severity), telemetry::Level::default());
    }

    #[test]
    fn what_the_operator_sets_reaches_the_part_that_it_is_about() {
        let settings = settings(&[
            ("InterfacePrefix", "tap,cali"),
            ("IptablesBackend", "NFT"),
            ("ChainInsertMode", "append"),
            ("IPForwarding", "Disabled"),
            ("IptablesRefreshInterval", "0"),
            ("IptablesPostWriteCheckIntervalSecs", "0.5"),
            ("IptablesFilterDenyAction", "REJECT"),
            ("IptablesFilterAllowAction", "RETURN"),
            ("DefaultEndpointToHostAction", "ACCEPT"),
            ("IptablesMarkMask", "0x1f"),
            ("MetadataAddr", "none"),
            ("DisableConntrackInvalidCheck", "true"),
            ("FailsafeInboundHostPorts", "udp:10.0.0.0/8:53"),
            ("FailsafeOutboundHostPorts", "none"),
            ("LogActionRateLimit", "3/hour"),
            ("LogSeverityScreen", "FATAL"),
        ]);
        let (compiler, dataplane) = (compiler(&settings).unwrap(), dataplane(&settings));
        assert_eq!(compiler.interface_prefixes, ["tap", "cali"]);
        assert!(compiler.openstack && !compiler.check_invalid);
        assert_eq!(compiler.metadata_address, None);
        assert_eq!((compiler.marks.accept, compiler.marks.endpoint), (1, 0));
        assert_eq!(compiler.filter_deny, compiler::options::DenyAction::Reject);
        assert_eq!(compiler.filter_allow, compiler::options::AllowAction::Return);
        assert_eq!(compiler.mangle_allow, compiler::options::AllowAction::Accept);
        assert_eq!(compiler.endpoint_to_host, compiler::options::EndpointToHost::Accept);
        let net = "10.0.0.0/8".parse().ok();
        assert_eq!(compiler.failsafe_inbound, [Failsafe { protocol: "udp", port: 53, net }]);
        assert_eq!(compiler.failsafe_outbound, []);
        assert_eq!(compiler.log_rate, Some(program::Rate { count: 3, per: program::RateUnit::Hour }));
        assert_eq!(dataplane.variant, Some(dataplane::Variant::Nft));
        assert_eq!(dataplane.insert_mode, dataplane::ChainInsertMode::Append);
        assert_eq!(dataplane.table_refresh, None);
        assert_eq!(dataplane.post_write_check, std::time::Duration::from_millis(500));
        assert!(!dataplane.ip_forwarding);
        assert_eq!(level(settings.log_severity), telemetry::Level::Error);
    }

    fn settings(pairs: &[(&str, &str)]) -> Settings {
        let mut raw = Raw::default();
        raw.set(Source::Default, "FelixHostname", "h1");
        for (name, value) in pairs {
            raw.set(Source::File, name, value);
        }
        raw.resolve().unwrap().settings
    }
}
