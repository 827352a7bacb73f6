"""How tokens are cut into blocks of equal work, whatever the sizes of the bags.

Tokens and bag ends are merged into one list of items: the tokens of bag 0, its end, the tokens of bag 1, its end, and
so on. Program j takes items [j * block_items, (j + 1) * block_items): its length bounds the tokens and the bags of a
program alike, and it depends on shapes only. Exactly one program meets the end of each bag; a bag that crosses
programs leaves one partial result in each of the others.

Rows count tokens through all bags: row = bag * tokens + token when padded, the token itself when packed.
Offsets in cu_seqlens are clamped, so that bad ones never give an address out of bounds; pool_offsets makes their result
NaN.
"""

import triton
import triton.language as tl


@triton.jit
def offset_of(cu_ptr, cu_step, index, tokens):
    return tl.minimum(tl.maximum(tl.load(cu_ptr + index * cu_step).to(tl.int64), 0), tokens)


@triton.jit
def bag_rows(cu_ptr, cu_step, bag, tokens, PACKED: tl.constexpr):
    """The rows [start, end) of a bag."""
    if PACKED:
        start = offset_of(cu_ptr, cu_step, bag, tokens)
        end = offset_of(cu_ptr, cu_step, bag + 1, tokens)
    else:
        start = bag * tokens
        end = start + tokens
    return start, end


@triton.jit
def cut_point(cu_ptr, cu_step, item, bags, tokens, PACKED: tl.constexpr):
    """How many bag ends, and how many rows, come before an item: the bag and row a program starts with."""
    if PACKED:
        bag = item * 0
        last = bag + bags
        while bag < last:
            middle = (bag + last) // 2
            before = offset_of(cu_ptr, cu_step, middle + 1, tokens) + middle < item
            bag = tl.where(before, middle + 1, bag)
            last = tl.where(before, last, middle)
        row = tl.minimum(tl.maximum(item - bag, 0), tokens)
    else:
        bag = item // (tokens + 1)
        row = item - bag
    return bag, row


@triton.jit
def block_of_bag_start(cu_ptr, cu_step, bag, tokens, block_items, PACKED: tl.constexpr):
    """The program that meets the first item of a bag."""
    start, _end = bag_rows(cu_ptr, cu_step, bag, tokens, PACKED)
    return (start + bag) // block_items


@triton.jit
def bags_of_rows(cu_ptr, cu_step, rows, bags, tokens, PACKED: tl.constexpr):
    """The bag of each row, and whether there is one."""
    if PACKED:
        bag = rows * 0
        last = bag + bags
        width = tl.cast(bags, tl.int64)
        while width > 0:
            # Lanes that are done have bag == last and stay there.
            middle = (bag + last) // 2
            active = bag < last
            end = tl.load(cu_ptr + (middle + 1) * cu_step, mask=active, other=0).to(tl.int64)
            before = active & (tl.minimum(tl.maximum(end, 0), tokens) <= rows)
            bag = tl.where(before, middle + 1, bag)
            last = tl.where(active & (before == 0), middle, last)
            width = width // 2
        inside = bag < bags
        bag = tl.where(inside, bag, 0)
        start = tl.load(cu_ptr + bag * cu_step, mask=inside, other=0).to(tl.int64)
        inside = inside & (rows >= start)
    else:
        bag = rows // tokens
        inside = bag < bags
        bag = tl.where(inside, bag, 0)
    return bag, inside
