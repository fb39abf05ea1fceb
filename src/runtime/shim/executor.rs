//! The last step inside a container: the system call filter, then the program.
//!
//! libcontainer calls it after capabilities were dropped and no_new_privileges was set, for the main process and for
//! commands run later alike; neither gets its filter from the spec, so neither can miss it.

use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};

use libcontainer::workload::default::DefaultExecutor;
use libcontainer::workload::{Executor, ExecutorError, ExecutorValidationError};
use oci_spec::runtime::{Capability, Process, Spec};
use seccompiler::BpfProgram;

use crate::linux::{init, process};
use crate::runtime::bundle::INIT_ANNOTATION;
use crate::runtime::seccomp::{SeccompError, default_profile};

#[derive(Clone)]
pub struct FilteredExecutor {
    programs: Vec<BpfProgram>,
    has_init: bool,
}

impl FilteredExecutor {
    /// The filter depends on the capabilities that `process` keeps.
    pub fn new(process: Option<&Process>) -> Result<FilteredExecutor, SeccompError> {
        let kept = process.and_then(|process| process.capabilities().as_ref()?.bounding().clone());
        let has = |capability: Capability| kept.as_ref().is_some_and(|kept| kept.contains(&capability));
        Ok(FilteredExecutor { programs: default_profile(&has)?, has_init: false })
    }
}

impl FilteredExecutor {
    /// For a container's main process: an init stays before it if the spec asks for one. Commands that are run later
    /// have no use for it.
    pub fn with_init_of(mut self, spec: &Spec) -> FilteredExecutor {
        let annotations = spec.annotations().as_ref();
        self.has_init = annotations.is_some_and(|annotations| annotations.contains_key(INIT_ANNOTATION));
        self
    }
}

impl Executor for FilteredExecutor {
    fn exec(&self, spec: &Spec) -> Result<(), ExecutorError> {
        if let Err(error) = process::reset_signals() {
            return Err(ExecutorError::Execution(Box::new(error)));
        }
        for program in &self.programs {
            if let Err(error) = seccompiler::apply_filter(program) {
                // Into the container's log: nobody else listens any more.
                eprintln!("tinydc: install the system call filter: {error}");
                return Err(ExecutorError::Execution(Box::new(error)));
            }
        }
        if self.has_init {
            // The filter holds for both. This thread is the only one: libcontainer cloned a process of one.
            if let Err(error) = init::stay_as_init() {
                eprintln!("tinydc: make the first process: {error}");
                return Err(ExecutorError::Execution(Box::new(error)));
            }
            let Err(error) = DefaultExecutor {}.exec(spec) else { init::give_up(0) };
            eprintln!("tinydc: {error}");
            init::give_up(127);
        }
        DefaultExecutor {}.exec(spec).inspect_err(|error| eprintln!("tinydc: {error}"))
    }

    fn validate(&self, spec: &Spec) -> Result<(), ExecutorValidationError> {
        let refuse = |text: String| Err(ExecutorValidationError::ArgValidationError(text));
        let Some(process) = spec.process() else { return refuse("the spec has no process".into()) };
        let Some(program) = process.args().as_ref().and_then(|args| args.first()) else {
            return refuse("nothing to run".into());
        };
        let variables = process.env().as_deref().unwrap_or_default();
        let path = variables.iter().find_map(|variable| variable.strip_prefix("PATH=")).unwrap_or_default();
        let places: Vec<PathBuf> = match program.contains('/') {
            true => vec![process.cwd().join(program)],
            false => path.split(':').map(|folder| Path::new(folder).join(program)).collect(),
        };
        let Some(found) = places.iter().find(|place| place.exists()) else {
            return refuse(format!("`{program}` is not in the image (PATH is {path})"));
        };
        match found.metadata() {
            Ok(metadata) if metadata.is_file() && metadata.permissions().mode() & 0o111 != 0 => Ok(()),
            Ok(_) => refuse(format!("`{}` cannot be executed", found.display())),
            Err(error) => refuse(format!("`{}`: {error}", found.display())),
        }
    }
}
