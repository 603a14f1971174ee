//! The kernels' arguments, field by field as in `cuda/*.cu`, and their grids.

use std::ffi::CStr;
use std::ops::Range;

use super::device::{Address, Device, DeviceError, Launch};
use super::layout::Packing;

/// Lanes of a warp.
const LANES: u32 = 32;
/// Inputs of a pair of k-tiles.
pub(super) const PAIR: usize = 32;
/// Outputs of a tile of rows.
pub(super) const TILE_ROWS: usize = 16;
/// Tokens of a tile of columns.
pub(super) const TILE_TOKENS: usize = 8;
/// Bytes of a tile of rows for each pair of k-tiles.
pub(super) const TILE_PAIR_BYTES: usize = 2 * 32 * 16;
/// Threads of a block that works on a row.
const ROW_THREADS: u32 = 256;
/// Places in a row of a thread that are under way together.
const EACH: u32 = 4;
/// Shards that a block sums at most.
const TOGETHER_MAX: u32 = 4;
/// Pairs of a segment of queries, keys and values, whose tiles alone are too few to keep a GPU's memory busy.
pub(super) const QKV_SEGMENT_PAIRS: usize = 32;
/// Warps of a block of `few`.
const FEW_WARPS: u32 = 8;
/// Most tokens that `few` takes.
pub(super) const FEW_TOKENS_MAX: u32 = 64;
/// Most tokens that `few` takes where there are warpgroups: above it reads activations more often than weights.
const FEW_TOKENS_MAX_BESIDE_WIDE: u32 = 32;
/// Architecture whose warpgroups multiply.
pub(super) const HOPPER: u16 = 90;
/// Up to so many tokens the smaller blocks of `many` and `wide` are more of them than a GPU has multiprocessors.
const MANY_SMALL_TOKENS_MAX: u32 = 512;
/// Positions of a chunk of attention.
pub(super) const CHUNK: usize = 64;

#[repr(C)]
#[derive(Clone, Copy)]
pub(super) struct Product {
    pub(super) weights: Address,
    pub(super) x: Address,
    pub(super) tiles: u32,
    pub(super) tokens: u32,
    pub(super) token_tiles: u32,
    pub(super) pairs: u32,
    pub(super) segment: u32,
    pub(super) together: u32,
}

#[repr(C)]
#[derive(Clone, Copy)]
pub(super) struct Qkv {
    pub(super) product: Product,
    pub(super) positions: Address,
    pub(super) places: Address,
    pub(super) kv: Kv,
    pub(super) turns: Address,
    pub(super) queries: Address,
    pub(super) heads: u32,
    pub(super) kv_heads: u32,
    pub(super) rotary_pairs: u32,
}

#[repr(C)]
#[derive(Clone, Copy)]
pub(super) struct Kv {
    pub(super) data: Address,
    pub(super) stride: u64,
    pub(super) dim: u32,
    pub(super) fp8: u32,
}

/// How activations stand in memory (`cuda/base.cuh`).
#[repr(u32)]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Order {
    Packed = 0,
    Tiled = 1,
    Rows = 2,
}

#[repr(C)]
#[derive(Clone, Copy)]
pub(super) struct Activations {
    pub(super) numbers: Address,
    pub(super) token_tiles: u32,
    pub(super) pairs: u32,
    pub(super) shards: u32,
    pub(super) order: Order,
}

#[repr(C)]
#[derive(Clone, Copy)]
pub(super) struct GateUp {
    pub(super) product: Product,
    pub(super) out: Activations,
}

#[repr(C)]
#[derive(Clone, Copy)]
pub(super) struct Plain {
    pub(super) product: Product,
    pub(super) out: Address,
    pub(super) width: u32,
}

#[repr(C)]
#[derive(Clone, Copy)]
pub(super) struct Attend {
    pub(super) queries: Address,
    pub(super) kv: Kv,
    pub(super) tiles: Address,
    pub(super) table: Address,
    pub(super) out: Activations,
    pub(super) partials: Address,
    pub(super) scale: f32,
    pub(super) tile_count: u32,
    pub(super) tokens: u32,
    pub(super) kv_heads: u32,
    pub(super) group: u32,
    pub(super) window: u32,
    pub(super) chunks: u32,
}

#[repr(C)]
#[derive(Clone, Copy)]
pub(super) struct Tree {
    pub(super) merges: u64,
    pub(super) present: u64,
    pub(super) perfect: u32,
}

#[repr(C)]
#[derive(Clone, Copy)]
pub(super) struct Embed {
    pub(super) rows: Address,
    pub(super) ids: Address,
    pub(super) last: Address,
    pub(super) out: Address,
    pub(super) stride: u64,
    pub(super) pieces: u32,
    pub(super) first: u32,
    pub(super) own: u32,
    pub(super) hidden: u32,
}

#[repr(C)]
#[derive(Clone, Copy)]
struct Piece {
    leaves: Address,
    out: Address,
    stride: u64,
    count: u64,
    blocks: u32,
    tree: Tree,
}

#[repr(C)]
#[derive(Clone, Copy)]
pub(super) struct AddNorm {
    pub(super) leaves: Address,
    pub(super) residual: Address,
    pub(super) weight: Address,
    pub(super) out: Activations,
    pub(super) plain: Address,
    pub(super) stride: u64,
    pub(super) hidden: u32,
    pub(super) starts: u32,
    pub(super) eps: f32,
    pub(super) tree: Tree,
}

#[repr(C)]
#[derive(Clone, Copy)]
pub(super) struct Pick {
    pub(super) from: Activations,
    pub(super) to: Activations,
    pub(super) wanted: Address,
}

#[repr(C)]
#[derive(Clone, Copy)]
pub(super) struct Unpack {
    pub(super) weights: Address,
    pub(super) out: Address,
    pub(super) tiles: u32,
    pub(super) pairs: u32,
    pub(super) shards: u32,
}

#[repr(C)]
#[derive(Clone, Copy)]
pub(super) struct Finished<F> {
    pub(super) finish: F,
    pub(super) sums: Address,
}

/// Ranks that meet by each other's memory at most.
pub(super) const RANKS_MAX: usize = 8;

#[repr(C)]
#[derive(Clone, Copy)]
pub(super) struct Share {
    pub(super) pieces: Address,
    pub(super) inboxes: [Address; RANKS_MAX],
    pub(super) signals: [Address; RANKS_MAX],
    pub(super) turns: Address,
    pub(super) over: Address,
    pub(super) count: u64,
    pub(super) rank: u32,
    pub(super) ranks: u32,
    pub(super) blocks: u32,
}

#[repr(C)]
#[derive(Clone, Copy)]
pub(super) struct Join {
    pub(super) parts: Address,
    pub(super) out: Address,
    pub(super) starts: [u32; RANKS_MAX + 1],
    pub(super) rows: u32,
    pub(super) width: u32,
    pub(super) ranks: u32,
}

#[repr(C)]
#[derive(Clone, Copy)]
pub(super) struct Keep {
    pub(super) from: Address,
    pub(super) slots: Address,
    pub(super) ids: Address,
    pub(super) last: Address,
    pub(super) count: u32,
}

/// How many of a rank's shards a product of so many tokens can sum: those of each of `pieces`, nodes of the tree, in groups that are
/// nodes, too.
pub(super) fn together(
    device: &dyn Device,
    tokens: usize,
    pieces: impl Iterator<Item = Range<usize>>,
) -> usize {
    if !is_wide(device, tokens) || tokens <= MANY_SMALL_TOKENS_MAX as usize {
        return 1;
    }
    let twos = |piece: Range<usize>| (piece.start | piece.len()).trailing_zeros();
    1 << pieces.map(twos).min().unwrap_or(0).min(TOGETHER_MAX.ilog2())
}

/// The kernels that compute one kind of product with weights of one [`Packing`].
pub(super) struct Kernels {
    few: [&'static CStr; 4],
    many: [&'static CStr; 2],
    wide: [&'static CStr; 2],
    /// Tokens of a block of the second, and whether it sums shards.
    wide_tokens: u32,
    sums: bool,
}

/// Whether warpgroups multiply so many tokens.
fn is_wide(device: &dyn Device, tokens: usize) -> bool {
    device.architecture() == HOPPER && tokens > FEW_TOKENS_MAX_BESIDE_WIDE as usize
}

/// How our products take the activations of so many tokens.
pub(super) fn order(device: &dyn Device, tokens: usize) -> Order {
    if is_wide(device, tokens) { Order::Tiled } else { Order::Packed }
}

pub(super) const QKV: [Kernels; 2] = [
    Kernels {
        few: [c"qkv_few_1", c"qkv_few_2", c"qkv_few_4", c"qkv_few_8"],
        many: [c"qkv_many_1x4", c"qkv_many_4x2"],
        wide: [c"qkv_wide_64", c"qkv_wide_128"],
        wide_tokens: 128,
        sums: false,
    },
    Kernels {
        few: [c"qkv_fp8_few_1", c"qkv_fp8_few_2", c"qkv_fp8_few_4", c"qkv_fp8_few_8"],
        many: [c"qkv_fp8_many_1x4", c"qkv_fp8_many_4x2"],
        wide: [c"qkv_fp8_wide_64", c"qkv_fp8_wide_128"],
        wide_tokens: 128,
        sums: false,
    },
];
pub(super) const GATE_UP: [Kernels; 2] = [
    Kernels {
        few: [c"gate_up_few_1", c"gate_up_few_2", c"gate_up_few_4", c"gate_up_few_8"],
        many: [c"gate_up_many_1x4", c"gate_up_many_4x2"],
        wide: [c"gate_up_wide_64", c"gate_up_wide_256"],
        wide_tokens: 256,
        sums: false,
    },
    Kernels {
        few: [c"gate_up_fp8_few_1", c"gate_up_fp8_few_2", c"gate_up_fp8_few_4", c"gate_up_fp8_few_8"],
        many: [c"gate_up_fp8_many_1x4", c"gate_up_fp8_many_4x2"],
        wide: [c"gate_up_fp8_wide_64", c"gate_up_fp8_wide_256"],
        wide_tokens: 256,
        sums: false,
    },
];
pub(super) const PLAIN: [Kernels; 2] = [
    Kernels {
        few: [c"plain_few_1", c"plain_few_2", c"plain_few_4", c"plain_few_8"],
        many: [c"plain_many_1x4", c"plain_many_4x2"],
        wide: [c"plain_wide_64", c"plain_wide_128"],
        wide_tokens: 128,
        sums: true,
    },
    Kernels {
        few: [c"plain_fp8_few_1", c"plain_fp8_few_2", c"plain_fp8_few_4", c"plain_fp8_few_8"],
        many: [c"plain_fp8_many_1x4", c"plain_fp8_many_4x2"],
        wide: [c"plain_fp8_wide_64", c"plain_fp8_wide_128"],
        wide_tokens: 128,
        sums: true,
    },
];

/// Shared memory of a block of `many` of so many warps: four stages of bf16 (FP8 takes less), and the sums so far.
const fn many_shared_bytes(rows: u32, columns: u32) -> u32 {
    4 * (2 * 4 * rows + 8 * columns) * LANES * 16 + 128 * 4 * rows * columns * LANES
}

/// Shared memory of a block of `wide` for so many tokens: stages of two pairs of k-tiles, and what waits where shards are summed.
fn wide_shared_bytes(kernels: &Kernels, tokens: u32) -> u32 {
    let (stages, waiting) = match tokens {
        128 if kernels.sums => (5, 4 * 128 * tokens),
        128 => (6, 0),
        _ => (4, 0),
    };
    stages * 2 * (2 * 8 + tokens / 8) * LANES * 16 + waiting
}

/// Shared memory of a block without which no prompt can be run.
pub(super) const SHARED_BYTES_NEEDED: u32 = many_shared_bytes(1, 4);

/// Launches a product of as many shards, whose arguments begin with `product`.
///
/// # Safety
/// As [`Device::launch`].
pub(super) unsafe fn multiply<A>(
    device: &dyn Device,
    [bf16, fp8]: &[Kernels; 2],
    (packing, product): (Packing, &Product),
    shards: u32,
    arguments: &A,
) -> Result<(), DeviceError> {
    let Product { tiles, tokens, pairs, segment, together, .. } = *product;
    let kernels = if packing == Packing::Fp8 { fp8 } else { bf16 };
    if tiles == 0 || shards == 0 {
        return Ok(());
    }
    let small = tokens <= MANY_SMALL_TOKENS_MAX;
    let launch = if is_wide(device, tokens as usize) {
        const WARPS: u32 = 8;
        let (kernel, columns) =
            if small { (kernels.wide[0], 64) } else { (kernels.wide[1], kernels.wide_tokens) };
        let grid = [tokens.div_ceil(columns), tiles.div_ceil(WARPS), shards / together];
        Launch::new(kernel, grid, WARPS * LANES, wide_shared_bytes(kernels, columns), arguments)
    } else if tokens <= FEW_TOKENS_MAX {
        let kind = tokens.div_ceil(TILE_TOKENS as u32).next_power_of_two().ilog2();
        let segments = pairs.div_ceil(segment).clamp(1, FEW_WARPS);
        let grid = [tiles.div_ceil(FEW_WARPS / segments), 1, shards];
        let shared = (FEW_WARPS * LANES * 16) << kind;
        Launch::new(kernels.few[kind as usize], grid, FEW_WARPS * LANES, shared, arguments)
    } else {
        let small = small || many_shared_bytes(4, 2) > device.shared_bytes_max();
        let (kind, rows, columns) = if small { (0, 1, 4) } else { (1, 4, 2) };
        let grid = [tokens.div_ceil(64 * columns), tiles.div_ceil(4 * rows), shards];
        let shared = many_shared_bytes(rows, columns);
        Launch::new(kernels.many[kind], grid, rows * columns * LANES, shared, arguments)
    };
    // SAFETY: the caller's.
    unsafe { device.launch(&launch) }
}

/// Takes weights out of their fragments.
///
/// # Safety
/// As [`Device::launch`].
pub(super) unsafe fn unpack(
    device: &dyn Device,
    packing: Packing,
    unpack: &Unpack,
) -> Result<(), DeviceError> {
    const WARPS: u32 = 8;
    /// Of a warp: 16 rows of two pairs, and what keeps banks apart.
    const WARP_BYTES: u32 = 16 * 36 * 4;
    let kernel = if packing == Packing::Fp8 { c"unpack_fp8" } else { c"unpack" };
    let grid = [unpack.tiles.div_ceil(WARPS), unpack.pairs / 2, unpack.shards];
    // SAFETY: the caller's.
    unsafe { device.launch(&Launch::new(kernel, grid, WARPS * LANES, WARPS * WARP_BYTES, unpack)) }
}

/// Ends a product whose sums are there; `kernel` is that of its end.
///
/// # Safety
/// As [`Device::launch`].
pub(super) unsafe fn finish<F>(
    device: &dyn Device,
    kernel: &CStr,
    Product { tiles, tokens, .. }: &Product,
    finished: &Finished<F>,
) -> Result<(), DeviceError> {
    const WARPS: u32 = 8;
    let grid = [tiles.div_ceil(WARPS), tokens.div_ceil(TILE_TOKENS as u32), 1];
    // SAFETY: the caller's.
    unsafe { device.launch(&Launch::new(kernel, grid, WARPS * LANES, 0, finished)) }
}

/// Launches a kernel that has a block for each of `rows` rows.
///
/// # Safety
/// As [`Device::launch`].
pub(super) unsafe fn each_row<A>(
    device: &dyn Device,
    kernel: &CStr,
    rows: u32,
    arguments: &A,
) -> Result<(), DeviceError> {
    let launch = Launch::new(kernel, [rows, 1, 1], ROW_THREADS, 0, arguments);
    // SAFETY: the caller's.
    unsafe { device.launch(&launch) }
}

/// Threads of a block that goes through a row of so many numbers: as many as it takes, or as a block can have.
pub(super) fn threads_of(row: u32) -> u32 {
    const THREADS_MAX: u32 = 1024;
    row.div_ceil(EACH).next_multiple_of(LANES).min(THREADS_MAX)
}

/// Launches [`AddNorm`] for so many tokens.
///
/// # Safety
/// As [`Device::launch`].
pub(super) unsafe fn add_norm(device: &dyn Device, tokens: u32, a: &AddNorm) -> Result<(), DeviceError> {
    let threads = threads_of(a.hidden);
    // The row, the weights, and what each warp has of the squares.
    let shared_bytes = (2 * a.hidden + LANES) * size_of::<f32>() as u32;
    // SAFETY: the caller's.
    unsafe { device.launch(&Launch::new(c"add_norm", [tokens, 1, 1], threads, shared_bytes, a)) }
}

/// Sums `count` numbers of each slot in the tree's order.
///
/// # Safety
/// As [`Device::launch`].
pub(super) unsafe fn sum_slots(
    device: &dyn Device,
    [leaves, out]: [Address; 2],
    [stride, count]: [usize; 2],
    tree: Tree,
) -> Result<(), DeviceError> {
    /// More blocks than any GPU runs at once.
    const BLOCKS_MAX: usize = 2048;
    let blocks = count.div_ceil((EACH * ROW_THREADS) as usize).min(BLOCKS_MAX) as u32;
    if blocks == 0 {
        return Ok(());
    }
    let arguments = Piece { leaves, out, stride: stride as u64, count: count as u64, blocks, tree };
    // SAFETY: the caller's.
    unsafe { each_row(device, c"piece", blocks, &arguments) }
}

/// Launches attention: what few tokens found in each chunk is merged by a second kernel.
///
/// # Safety
/// As [`Device::launch`].
pub(super) unsafe fn attend(device: &dyn Device, a: &Attend) -> Result<(), DeviceError> {
    /// Warps of a block that run through many tokens: neighbours read the same keys.
    const WARPS: u32 = 4;
    let (by_format, merge) = match a.kv.dim {
        32 => ([c"attend_32", c"attend_32_fp8"], c"merge_32"),
        64 => ([c"attend_64", c"attend_64_fp8"], c"merge_64"),
        96 => ([c"attend_96", c"attend_96_fp8"], c"merge_96"),
        _ => ([c"attend_128", c"attend_128_fp8"], c"merge_128"),
    };
    let attend = by_format[a.kv.fp8 as usize];
    if a.kv_heads == 0 {
        return Ok(());
    }
    let waiting = a.kv.dim / 8 * 4 * 4; // bytes a thread
    // SAFETY: the caller's.
    unsafe {
        if a.chunks == 0 {
            let grid = [a.tile_count.div_ceil(WARPS), a.kv_heads, 1];
            return device.launch(&Launch::new(attend, grid, WARPS * LANES, WARPS * LANES * waiting, a));
        }
        device.launch(&Launch::new(
            attend,
            [a.tile_count, a.kv_heads, a.chunks],
            LANES,
            LANES * waiting,
            a,
        ))?;
        device.launch(&Launch::new(merge, [a.tile_count, a.kv_heads, 1], WARPS * LANES, 0, a))
    }
}
