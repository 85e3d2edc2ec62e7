//! Where the tables are: which variant's programs to use, and a way to reach each family's tables.
//!
//! The apply loop decides when, a [`Backend`] finds out what there is, a [`TableTransport`] performs.
//! [`Installed`] and [`super::TableTools`] are the programs of this host.

use std::fmt;
use std::time::Duration;

use futures_util::FutureExt as _;
use futures_util::future::{BoxFuture, pending, ready};
use model::Family;
use program::{SetName, Table};
use tracing::{info, warn};

use super::evidence::{self, Decision};
use super::features::Features;
use super::hits::hits;
use super::leftovers::legacy_has_some;
use super::lock::{LockFigures, XtablesLock};
use super::sticky;
use super::table::{ForeignChange, TableRequest, TableResponse};
use super::tools::TableTools;
use super::users::rules_naming;
use super::variant::{self, Programs};
use crate::canary::{self, Outcome};
use crate::error::DriverError;
use crate::options::{Options, Variant};
use crate::report::DriverReport;

/// Performs what the table drivers of one family ask for, one request at a time. A request whose future is
/// dropped may or may not have had its effect.
pub trait TableTransport: fmt::Debug + Send {
    /// Performs one request.
    fn perform<'a>(&'a mut self, request: &'a TableRequest) -> BoxFuture<'a, TableResponse>;

    /// Returns what somebody else did since this was last asked, as far as that can be told without reading tables.
    fn foreign_changes(&mut self) -> Vec<ForeignChange> {
        Vec::new()
    }

    /// Waits until [`Self::foreign_changes`] has something to tell. May be given up at any time.
    fn foreign_change(&mut self) -> BoxFuture<'_, ()> {
        pending().boxed()
    }

    /// Returns whether it is proven that a table is as it was when it was last listed. What was written to it since by
    /// whomever, also by us, counts as a change.
    fn is_unchanged(&mut self, _table: Table) -> BoxFuture<'_, bool> {
        ready(false).boxed()
    }

    /// Returns how long the xtables lock was held and waited for since this was last asked.
    fn take_lock_figures(&mut self) -> LockFigures {
        LockFigures::default()
    }

    /// Returns the processor time that programs have used since the start.
    fn cpu_time(&self) -> Duration {
        Duration::ZERO
    }

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

    /// Proves that packets see our hook in raw PREROUTING; `None` if that makes no sense here.
    fn prove<'a>(
        &'a mut self,
        _family: Family,
        _variant: Variant,
        _options: &'a Options,
    ) -> BoxFuture<'a, Option<Outcome>> {
        ready(None).boxed()
    }

    /// Removes what is ours from nf_tables beside the tables of `in_use`.
    fn sweep_nft<'a>(
        &'a mut self,
        _family: Family,
        _in_use: Variant,
        _options: &'a Options,
    ) -> BoxFuture<'a, Option<DriverReport>> {
        ready(None).boxed()
    }
}

/// The programs that are installed on this host.
#[derive(Debug, Default)]
pub struct Installed {
    /// What the log was last told about the choice.
    explained: Option<Decision>,
    /// The log was told that the choice cannot be remembered.
    forgetful: bool,
}

impl Backend for Installed {
    fn choose<'a>(&'a mut self, options: &'a Options) -> BoxFuture<'a, Result<Tools, DriverError>> {
        self.choose_for(options).boxed()
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

    fn prove<'a>(
        &'a mut self,
        family: Family,
        variant: Variant,
        options: &'a Options,
    ) -> BoxFuture<'a, Option<Outcome>> {
        async move {
            let count = move || hits(family, variant, options).boxed();
            Some(canary::prove(family, options, &count).await)
        }
        .boxed()
    }

    fn sweep_nft<'a>(
        &'a mut self,
        family: Family,
        in_use: Variant,
        options: &'a Options,
    ) -> BoxFuture<'a, Option<DriverReport>> {
        super::leftovers::sweep_nft(family, in_use, options).boxed()
    }
}

impl Installed {
    async fn choose_for(&mut self, options: &Options) -> Result<Tools, DriverError> {
        let decision = decide(options).await;
        // Attempts that fail come again and again.
        if self.explained.as_ref() != Some(&decision) {
            decision.log();
        }
        let chosen = decision.chosen;
        self.explained = Some(decision);
        let tools = prepare(chosen, options).await?;
        if let Some(directory) = &options.state_directory
            && let Err(error) = sticky::remember(directory, tools.variant)
            && !std::mem::replace(&mut self.forgetful, true)
        {
            let directory = directory.display();
            warn!(%directory, %error, "the iptables variant cannot be remembered, the next start chooses anew");
        }
        Ok(tools)
    }
}

/// Looks at the host and chooses. Changes nothing.
pub async fn decide(options: &Options) -> Decision {
    let directories = variant::search_path();
    let evidence = evidence::gather(families(options), &directories, options.program_timeout, options.netlink_timeout);
    let remembered = options.state_directory.as_deref().and_then(sticky::recall);
    Decision::new(evidence.await, options.variant, remembered)
}

/// Returns the families that are to be written.
pub fn families(options: &Options) -> impl Iterator<Item = Family> + use<> {
    let ipv6 = options.ipv6;
    Family::BOTH.into_iter().filter(move |family| ipv6 || *family == Family::V4)
}

async fn prepare(asked: Variant, options: &Options) -> Result<Tools, DriverError> {
    let directories = variant::search_path();
    let limit = options.program_timeout;
    let lock = XtablesLock::new(options.lock_file.clone(), options.lock_probe);
    let mut tools = Tools { variant: asked, families: Vec::new() };
    for family in families(options) {
        let programs = Programs::find(family, asked, &directories)?;
        let (found, features) = variant::probe(&programs, &options.features, limit).await?;
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
        let mut transport = TableTools::new(family, found, programs, &features, lock.clone(), options);
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
    if variant == Variant::Nft || !legacy_has_some(family, &programs, options).await {
        // The nft variant is swept over netlink.
        return None;
    }
    let features = match variant::probe(&programs, &options.features, limit).await {
        Ok((found, features)) if found == variant => features,
        Ok(_) | Err(_) => return None,
    };
    let lock = XtablesLock::new(options.lock_file.clone(), options.lock_probe);
    let transport = TableTools::new(family, variant, programs, &features, lock, options);
    Some(FamilyTools { family, features, transport: Box::new(transport) })
}
