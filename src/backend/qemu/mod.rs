//! stub
#![allow(missing_docs)]
use super::live::*;
use std::sync::Arc;
pub struct Guest;
pub struct QmpAddress;
impl QmpAddress {
    pub fn parse(_: &str) -> Result<Self, LiveError> {
        Ok(Self)
    }
}
impl Guest {
    pub fn connect(_: &QmpAddress) -> Result<Arc<Self>, LiveError> {
        Err(LiveError::Gone(String::new()))
    }
    pub fn set_allow_write(&self, _: bool) {}
}
impl LiveControl for Guest {
    fn snapshot(&self) -> Result<Arc<dyn super::Backend>, LiveError> {
        todo!()
    }
    fn run_state(&self) -> Result<RunState, LiveError> {
        todo!()
    }
    fn happenings(&self) -> Vec<Happening> {
        todo!()
    }
    fn may_write(&self) -> bool {
        todo!()
    }
    fn monitor(&self, _: &str) -> Result<String, LiveError> {
        todo!()
    }
    fn pause(&self) -> Result<(), LiveError> {
        todo!()
    }
    fn unpause(&self) -> Result<(), LiveError> {
        todo!()
    }
    fn attach(&self) -> Result<Stop, LiveError> {
        todo!()
    }
    fn detach(&self, _: bool) -> Result<(), LiveError> {
        todo!()
    }
    fn can_reverse(&self) -> bool {
        todo!()
    }
    fn insert(&self, _: Point, _: crate::addr::VirtAddr, _: u64) -> Result<(), LiveError> {
        todo!()
    }
    fn remove(&self, _: Point, _: crate::addr::VirtAddr, _: u64) -> Result<(), LiveError> {
        todo!()
    }
    fn resume(&self, _: &[(Option<u32>, Go)]) -> Result<(), LiveError> {
        todo!()
    }
    fn reverse(&self, _: Go) -> Result<(), LiveError> {
        todo!()
    }
    fn interrupt(&self) -> Result<(), LiveError> {
        todo!()
    }
    fn wait_stop(&self, _: std::time::Duration) -> Result<Option<Stop>, LiveError> {
        todo!()
    }
    fn write_phys(&self, _: crate::addr::PhysAddr, _: &[u8]) -> Result<(), LiveError> {
        todo!()
    }
    fn write_register(&self, _: u32, _: &str, _: &[u8]) -> Result<(), LiveError> {
        todo!()
    }
}
