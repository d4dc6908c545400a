//! What users ask of the pager: `holo status`, `holo detach`.

use super::Watch;
use crate::core::Input;
use crate::shell::console::{Request, What};
use crate::shell::control::Scalar;
use crate::shell::report;

impl Watch {
    pub(super) fn answer(&mut self, request: Request) {
        let Request { what, pid, reply } = request;
        let root = self.control.pid(Scalar::RootPid);
        let names_all = pid == root || self.is_ours(pid);
        if !names_all && !self.members.contains_key(&pid) {
            reply.refuse(&format!("process {pid} is not held by holo"));
            return;
        }
        match what {
            What::Detach if !names_all => reply.refuse(&format!(
                "process {pid} is held together with process {root}: `holo detach {root}` lets go of both"
            )),
            What::Detach => {
                self.control.set(Scalar::Detaching, 1);
                self.detach_all();
                self.console.reply_at_end(reply);
            }
            What::Status => {
                self.control.note_cpu(Scalar::CpuOfPager);
                let report = report::build(self.control, None, 0);
                reply.send(&serde_json::to_string(&report).unwrap_or_default());
            }
        }
    }

    pub(super) fn is_detaching(&self) -> bool {
        self.control.get(Scalar::Detaching) != 0
    }

    pub(super) fn detach_all(&mut self) {
        let spaces: Vec<_> = self.spaces.keys().copied().collect();
        for space in spaces {
            self.input(Input::Detach(space));
        }
        // Members that were never taken have nothing to give back.
        self.members.retain(|_, m| m.is_held());
    }
}
