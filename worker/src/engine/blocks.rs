//! Free KV blocks. Plain accounting: which numbers are free, nothing of what they hold.

/// Number of a block.
pub type Block = u32;

/// A bounded set of blocks, last freed first taken.
#[derive(Debug)]
pub struct BlockPool {
    free: Vec<Block>,
    taken: Vec<bool>,
    block_size: usize,
}

impl BlockPool {
    /// `count` free blocks of `block_size` rows.
    pub fn new(count: usize, block_size: usize) -> Self {
        let free = (0..count as Block).rev().collect();
        Self { free, taken: vec![false; count], block_size }
    }

    /// All blocks.
    pub fn total(&self) -> usize {
        self.taken.len()
    }

    /// Blocks nobody has.
    pub fn free(&self) -> usize {
        self.free.len()
    }

    /// Rows of one block.
    pub fn block_size(&self) -> usize {
        self.block_size
    }

    /// Blocks that `rows` need.
    pub fn needed(&self, rows: usize) -> usize {
        rows.div_ceil(self.block_size)
    }

    /// Extends `blocks` until they hold `rows`. False: not enough free ones, nothing was taken.
    pub fn extend(&mut self, blocks: &mut Vec<Block>, rows: usize) -> bool {
        let missing = self.needed(rows).saturating_sub(blocks.len());
        if missing > self.free.len() {
            return false;
        }
        for _ in 0..missing {
            let Some(block) = self.free.pop() else { break };
            self.taken[block as usize] = true;
            blocks.push(block);
        }
        true
    }

    /// Gives blocks back. Panics on a block that was not taken: it would be handed out twice.
    pub fn give(&mut self, blocks: impl IntoIterator<Item = Block>) {
        for block in blocks {
            assert!(self.taken[block as usize], "block {block} freed twice");
            self.taken[block as usize] = false;
            self.free.push(block);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn takes_all_or_nothing() {
        let mut pool = BlockPool::new(4, 16);
        let (mut a, mut b) = (vec![], vec![]);
        assert!(pool.extend(&mut a, 17));
        assert!(!pool.extend(&mut b, 33));
        assert_eq!((a.len(), b.len(), pool.free()), (2, 0, 2));
        assert!(pool.extend(&mut a, 32), "two blocks hold 32 rows already");
        pool.give(a);
        assert_eq!(pool.free(), 4);
    }

    #[test]
    #[should_panic(expected = "freed twice")]
    fn refuses_a_second_release() {
        let mut pool = BlockPool::new(2, 16);
        let mut a = vec![];
        pool.extend(&mut a, 1);
        pool.give(a.clone());
        pool.give(a);
    }
}
