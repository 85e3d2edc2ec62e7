//! Where the tables are: which variant's programs to use, and a way to reach each family's tables.
//!
//! The apply loop decides when, a [`Backend`] finds out what there is, a [`TableTransport`] performs.
//! [`Installed`] and [`super::TableTools`] are the programs of this host.

use std::fmt;

use futures_util::FutureExt as _;
use futures_util::future::{BoxFuture, ready};
use model::Family;
use program::SetName;
use tracing::{info, warn};

use super::features::Features;
use super::parse::is_our_chain;
use super::table::{TableRequest, TableResponse};
use super::tools::TableTools;
use super::users::rules_naming;
use super::variant::{self, Programs};
use crate::error::DriverError;
use crate::options::{Options, Variant};

/// Performs what the table drivers of one family ask for, one request at a time. A request whose future is
/// dropped may or may not have had its effect.
pub trait TableTransport: fmt::Debug + Send {
    /// Performs one request.
    fn perform<'a>(&'a mut self, request: &'a TableRequest) -> BoxFuture<'a, TableResponse>;

    /// Returns what the programs can do if they have been replaced since they were last asked.
    fn changed_features(&mut self) -> BoxFuture<'_, Option<Features>> {
        ready(None).boxed()
    }

    /// Finds out whether the restore program may be held open, and does so from then on.
    fn try_to_hold_open(&mut self) -> BoxFuture<'_, ()> {
        ready(()).boxed()
    }
}

/// The tables of one family and variant.
#[derive(Debug)]
pub struct FamilyTools {
    pub family: Family,
    pub features: Features,
    pub transport: Box<dyn TableTransport>,
}

/// The variant to use, and the tables of every family that is wanted.
#[derive(Debug)]
pub struct Tools {
    pub variant: Variant,
    pub families: Vec<FamilyTools>,
}

/// Finds tables. See the [module documentation](self).
pub trait Backend: fmt::Debug + Send {
    /// Chooses the variant and asks its programs what they can do. Changes nothing.
    ///
    /// # Errors
    ///
    /// If there are no programs, or they do not answer.
    fn choose<'a>(&'a mut self, options: &'a Options) -> BoxFuture<'a, Result<Tools, DriverError>>;

    /// Returns the tables of `variant`, which is not in use, if they hold something of ours. Changes nothing and
    /// does not make tables that the kernel has not got.
    fn leftovers<'a>(
        &'a mut self,
        family: Family,
        variant: Variant,
        options: &'a Options,
    ) -> BoxFuture<'a, Option<FamilyTools>>;

    /// Returns the rules of anybody that name a set, in words for the operator.
    fn users_of_set<'a>(&'a mut self, _set: &'a SetName, _options: &'a Options) -> BoxFuture<'a, Vec<String>> {
        ready(Vec::new()).boxed()
    }
}

/// The programs that are installed on this host.
#[derive(Clone, Copy, Debug, Default)]
pub struct Installed;

impl Backend for Installed {
    fn choose<'a>(&'a mut self, options: &'a Options) -> BoxFuture<'a, Result<Tools, DriverError>> {
        choose(options).boxed()
    }

    fn leftovers<'a>(
        &'a mut self,
        family: Family,
        variant: Variant,
        options: &'a Options,
    ) -> BoxFuture<'a, Option<FamilyTools>> {
        leftovers(family, variant, options).boxed()
    }

    fn users_of_set<'a>(&'a mut self, set: &'a SetName, options: &'a Options) -> BoxFuture<'a, Vec<String>> {
        rules_naming(set, options).boxed()
    }
}

/// Returns the families that are to be written.
pub fn families(options: &Options) -> impl Iterator<Item = Family> + use<> {
    let ipv6 = options.ipv6;
    Family::BOTH.into_iter().filter(move |family| ipv6 || *family == Family::V4)
}

async fn choose(options: &Options) -> Result<Tools, DriverError> {
    let directories = variant::search_path();
    let limit = options.program_timeout;
    let asked = match options.variant {
        Some(variant) => variant,
        None => variant::choose(&variant::evidence(&directories, limit).await),
    };
    let mut tools = Tools { variant: asked, families: Vec::new() };
    for family in families(options) {
        let programs = Programs::find(family, asked, &directories)?;
        let (found, features) = variant::probe(&programs, limit).await?;
        let program = programs.restore.display().to_string();
        if found != asked {
            warn!(
                program,
                asked = asked.as_str(),
                found = found.as_str(),
                "the installed program is of the other variant"
            );
        }
        info!(program, variant = found.as_str(), ?features, "iptables chosen");
        tools.variant = found;
        let mut transport = TableTools::new(family, programs, &features, options.lock_probe, limit);
        if found == Variant::Nft {
            transport = transport.reading_over_netlink(options.netlink_timeout);
        }
        tools.families.push(FamilyTools { family, features, transport: Box::new(transport) });
    }
    Ok(tools)
}

async fn leftovers(family: Family, variant: Variant, options: &Options) -> Option<FamilyTools> {
    let directories = variant::search_path();
    let limit = options.program_timeout;
    let programs = Programs::find_named(family, variant, &directories)?;
    if variant == Variant::Legacy && variant::legacy_tables(family).is_none_or(|names| names.trim().is_empty()) {
        return None;
    }
    let listing = variant::listing(family, variant, &directories, limit).await;
    let mut chains = listing.lines().filter_map(|line| line.strip_prefix(':'));
    if !chains.any(is_our_chain) {
        return None;
    }
    let features = match variant::probe(&programs, limit).await {
        Ok((found, features)) if found == variant => features,
        Ok(_) | Err(_) => return None,
    };
    let transport = TableTools::new(family, programs, &features, options.lock_probe, limit);
    Some(FamilyTools { family, features, transport: Box::new(transport) })
}
