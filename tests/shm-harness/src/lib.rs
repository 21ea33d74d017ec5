//! A harness that proves what `docs/format.md` promises, with real processes.
//!
//! One writer replaces chunks without pause. Readers check every byte of what they read and of what
//! they go on holding across generations; a chunk's bytes are a pure function of its key, so each
//! byte can be checked. Writers and readers are killed with SIGKILL and stopped with SIGSTOP at
//! random. In the end there must be no wrong byte, no process that hung, and no memory that did not
//! come back. The same harness must catch deliberate mistakes (feature `mutants`).

pub mod conductor;
pub mod content;
pub mod hold;
pub mod reader;
pub mod report;
pub mod writer;
