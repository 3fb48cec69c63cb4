"""Neurons of a block by loops over their definition, and matrices in pieces as whole ones."""

import pytest
import torch
from conftest import TOKENS, WRITTEN_THROUGH, bridge_of

from tl_neuron_attr import (
    InputError,
    attn_decomposition,
    capture,
    capture_sources,
    ffn_decomposition,
    open_host,
    tokenize,
)
from tl_neuron_attr.decompose import Outlet, outlet, rows_at, slopes
from tl_neuron_attr.pieces import Pieces, blocks_of, times
from tl_neuron_attr.prompts import Prompt


def opened(family):
    host = open_host(bridge_of(family, dtype=torch.float64))
    return host, capture(host, tokenize(host, Prompt(tokens=TOKENS)))


@pytest.mark.parametrize("family", ["gpt2", "llama", "gemma3"])
def test_attention_neurons_are_numbered_by_head_source_and_dimension(family):
    host, captured = opened(family)
    block = attn_decomposition(host, captured, 1)
    n_heads, n_pos, d_head = block.shape
    group = n_heads // captured.v.shape[2]
    through = outlet(host, captured, "attn", 1)
    number = 0
    every = torch.arange(block.n_neurons)
    coefficients, vectors = block.coefficients_of(every), block.vectors(every)
    per_row = torch.arange(n_heads * d_head)
    total = torch.zeros_like(block.base)
    for head in range(n_heads):
        for source in range(n_pos):
            brought = torch.zeros_like(block.base)
            for index in range(d_head):
                wanted = captured.pattern[1, head, source] * captured.v[1, source, head // group]
                wanted = wanted[index]
                assert [int(each) for each in block.place(every[number : number + 1])] == [
                    *(head, source, index)
                ]
                assert float(coefficients[number]) == pytest.approx(float(wanted), abs=1e-15)
                row = head * d_head + index
                assert int(block.row_of(every[number : number + 1])) == row
                assert int(block.of_each(per_row)[number]) == row
                written = wanted * through(host.W_O(1)[head, index])
                torch.testing.assert_close(vectors[number], written, rtol=0, atol=1e-14)
                brought += written
                number += 1
            found = block.position_vectors()[head, source]
            torch.testing.assert_close(found, brought, rtol=0, atol=1e-13)
            total += brought
    assert number == block.n_neurons
    torch.testing.assert_close(block.sum(), total, rtol=0, atol=1e-13)
    assert torch.equal(block.all_coefficients(), coefficients)
    some = slice(1, 3)
    assert torch.equal(block.coefficients(some), block.coefficients()[some])
    whole = block.position_vectors()
    torch.testing.assert_close(block.position_vectors(some), whole[some], rtol=0, atol=1e-14)
    of_runs = block.of_each(torch.stack([per_row, 2 * per_row]))
    assert torch.equal(of_runs, torch.stack([block.row_of(every), 2 * block.row_of(every)]))
    norms = torch.stack([through(row).norm() for row in host.W_O(1).flatten(0, 1)])
    torch.testing.assert_close(block.norms(), norms)


@pytest.mark.parametrize("family", ["gpt2", "llama", "gemma3"])
def test_summed_over_sources_a_neuron_writes_what_it_writes_of_all_of_them(family):
    host, captured = opened(family)
    block = attn_decomposition(host, captured, 2)
    summed = block.over_sources()
    n_heads, n_pos, d_head = block.shape
    assert summed.shape == (n_heads, 1, d_head) and summed.summed and not block.summed
    each = block.vectors(torch.arange(block.n_neurons)).view(n_heads, n_pos, d_head, -1)
    found = summed.vectors(torch.arange(summed.n_neurons)).view(n_heads, d_head, -1)
    torch.testing.assert_close(found, each.sum(1), rtol=0, atol=1e-13)
    torch.testing.assert_close(block.head_vectors(), each.sum((1, 2)), rtol=0, atol=1e-13)


@pytest.mark.parametrize("family", ["gpt2", "olmo2", "granite"])
def test_ffn_neurons_are_rows_of_their_matrix_by_what_they_are_on(family):
    host, captured = opened(family)
    block = ffn_decomposition(host, captured, 1)
    through = outlet(host, captured, "ffn", 1)
    every = torch.arange(block.n_neurons)
    written = torch.stack(
        [captured.mlp_post[1, k] * through(host.W_out(1)[k]) for k in range(block.n_neurons)]
    )
    torch.testing.assert_close(block.vectors(every), written, rtol=0, atol=1e-14)
    torch.testing.assert_close(block.sum(), written.sum(0), rtol=0, atol=1e-13)
    bias = 0.0 if block.b_out is None else block.b_out
    # Hugging Face takes RMSNorms in float32
    torch.testing.assert_close(block.sum() + bias, captured.mlp_out[1], rtol=0, atol=1e-6)
    norms = torch.stack([through(row).norm() for row in host.W_out(1)])
    torch.testing.assert_close(block.norms(), norms)
    with pytest.raises(InputError, match="layer 3 is out of range: the model has 3"):
        ffn_decomposition(host, captured, 3)
    with pytest.raises(InputError, match="layer -1 is out of range"):
        attn_decomposition(host, captured, -1)


@pytest.mark.parametrize("family", WRITTEN_THROUGH)
def test_at_other_positions_sub_layers_write_through_the_norm_they_have_there(family):
    host, captured = opened(family)
    sources = capture_sources(host, captured, [0, 2, 3])
    places = torch.tensor([2, 0])
    for layer in range(host.n_layers):
        go = outlet(host, sources, "ffn", layer, places)
        written = sources.mlp_post[layer, places] @ host.W_out(layer)
        torch.testing.assert_close(go(written), sources.mlp_out[layer, places], rtol=0, atol=1e-6)
        everywhere = outlet(host, sources, "ffn", layer)
        written = sources.mlp_post[layer] @ host.W_out(layer)
        torch.testing.assert_close(everywhere(written), sources.mlp_out[layer], rtol=0, atol=1e-6)


def test_outlets_are_alike_where_their_scales_are_to_the_last_bit():
    one = Outlet(divisor=torch.tensor([[2.0]]))
    assert one.as_in(Outlet(divisor=torch.tensor([[2.0]])))
    assert not one.as_in(Outlet(divisor=torch.tensor([[2.0000002]])))
    assert not one.as_in(Outlet()) and not Outlet().as_in(one) and Outlet().as_in(Outlet())
    norms = torch.tensor([3.0, 4.0])
    assert Outlet(divisor=torch.tensor([2.0])).of_norms(norms).tolist() == [1.5, 2.0]


# --- a matrix in pieces ---


def in_pieces():
    generator = torch.Generator().manual_seed(0)
    stacks = tuple(
        torch.randn(*shape, generator=generator, dtype=torch.float64)
        for shape in ((3, 4, 5), (1, 7, 5), (2, 2, 5))
    )
    return Pieces(stacks), torch.cat([stack.flatten(0, 1) for stack in stacks])


def test_rows_in_pieces_are_read_and_written_by_their_numbers():
    pieces, whole = in_pieces()
    assert (len(pieces), pieces.shape, pieces.dtype) == (23, whole.shape, whole.dtype)
    assert repr(pieces) == "Pieces(23 x 5, in 6 matrices)"
    rows = torch.tensor([0, 3, 4, 11, 12, 18, 19, 20, 21, 22, 5, 5])
    assert torch.equal(pieces[(rows,)], whole[rows])
    assert torch.equal(rows_at(pieces, rows), whole[rows])
    for size in (1, 3, 100):
        split = list(pieces.split(size))
        assert torch.equal(torch.cat(split), whole) and max(map(len, split)) <= size
    written = torch.tensor([3, 12, 22, 4])
    values = torch.arange(20.0, dtype=torch.float64).view(4, 5)
    pieces[(written,)] = values
    whole[written] = values
    assert torch.equal(torch.cat(list(pieces.split(100))), whole)
    assert pieces.data_ptr() == pieces.stacks[0].data_ptr()


@pytest.mark.parametrize("used", [None, (), (0,), (1, 3, 5), (4,)])
@pytest.mark.parametrize("size", [1, 3, 100])
def test_products_of_pieces_are_those_of_the_matrix_with_zeros_for_what_is_of_no_use(used, size):
    pieces, whole = in_pieces()
    if used is not None:
        pieces = pieces.using(used)
        of = torch.tensor([0] * 4 + [1] * 4 + [2] * 4 + [3] * 7 + [4] * 2 + [5] * 2)
        whole = whole * torch.isin(of, torch.tensor(used, dtype=torch.long))[:, None]
    seen = torch.zeros_like(whole)
    for where, block in blocks_of(pieces, size):
        assert len(block) == where.stop - where.start <= size
        seen[where] = block
    assert torch.equal(seen, whole)
    vectors = torch.randn(2, 23, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    torch.testing.assert_close(times(vectors, pieces), vectors @ whole)
    gradients = vectors[:, :5]
    torch.testing.assert_close(slopes(pieces, gradients), gradients @ whole.T)
    # all rows, whatever products look at
    assert torch.equal(torch.cat(list(pieces.split(2))), in_pieces()[1])


def test_what_is_off_in_pieces_is_no_product_but_a_gradient_goes_through_it():
    pieces, whole = in_pieces()
    vectors = torch.zeros(1, 23, dtype=torch.float64, requires_grad=True)
    times(vectors, pieces).sum().backward()
    torch.testing.assert_close(vectors.grad[0], whole.sum(1))


@pytest.mark.parametrize("n_rows", [3, 1024, 1030])
def test_slopes_of_a_whole_matrix_go_by_blocks_of_rows(n_rows):
    generator = torch.Generator().manual_seed(0)
    rows = torch.randn(n_rows, 4, generator=generator).bfloat16()
    gradients = torch.randn(2, 4, generator=generator)
    torch.testing.assert_close(slopes(rows, gradients), gradients @ rows.float().T)
