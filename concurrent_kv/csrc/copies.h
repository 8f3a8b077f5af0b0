/* `gather` and `scatter`: tokens between slots and batches. Their counterparts are in `tensors.py`. */

#ifndef CONCURRENT_KV_COPIES_H
#define CONCURRENT_KV_COPIES_H

#include "arguments.h"
#include "tables.h"

/* A second version of a function and of what is inlined into it, for processors with wider registers, chosen when the
 * module is loaded. Additions are the same in both. */
#if defined(__x86_64__) && defined(__GLIBC__) && defined(__GNUC__) && !defined(__clang__)
#define WIDE __attribute__((target_clones("avx2", "default")))
#else
#define WIDE
#endif

#if defined(__GNUC__)
#define ALWAYS_INLINE static inline __attribute__((always_inline))
#else
#define ALWAYS_INLINE static inline
#endif

/* Handing the GIL over costs more than a shorter copy. */
#define LEAST_BYTES_WITHOUT_GIL 262144

/* Slots [planes, slots, heads] beside a batch [planes, rows, heads, columns], of `bytes` for each head of a token. */
typedef struct {
    char *slots, *batch;
    Py_ssize_t planes, num_slots, heads, bytes, rows, columns;
} Memory;

/* From the address of the slots, their shape, and the address of the batch. */
static int memory_of(PyObject *const *arguments, Memory *m)
{
    if (!PyTuple_Check(arguments[1])) {
        PyErr_Format(PyExc_TypeError, "shape must be a tuple, got %s", Py_TYPE(arguments[1])->tp_name);
        return 0;
    }
    if (!enough(PyTuple_GET_SIZE(arguments[1]), 4))
        return 0;
    m->slots = PyLong_AsVoidPtr(arguments[0]);
    m->batch = PyLong_AsVoidPtr(arguments[2]);
    Py_ssize_t shape[4];
    if (PyErr_Occurred() || !integers(((PyTupleObject *)arguments[1])->ob_item, 4, shape))
        return 0;
    for (int i = 0; i < 4; i++)
        if (shape[i] < 1) {
            PyErr_Format(PyExc_ValueError, "shape must be positive, got %zd", shape[i]);
            return 0;
        }
    m->planes = shape[0], m->num_slots = shape[1], m->heads = shape[2], m->bytes = shape[3];
    return 1;
}

static inline char *in_slots(const Memory *m, Py_ssize_t plane, int64_t slot)
{
    return m->slots + (plane * m->num_slots + slot) * m->heads * m->bytes;
}

static inline char *in_batch(const Memory *m, Py_ssize_t plane, int64_t row, Py_ssize_t head, int64_t column)
{
    return m->batch + (((plane * m->rows + row) * m->heads + head) * m->columns + column) * m->bytes;
}

/* What is owed to tokens that moved: differences [planes, positions + 1, heads] of float32, added for one drop after the
 * other, `count` positions apart. For every token gathered, `drops` that it has outlived, and where it was `at` after the
 * first of them. */
typedef struct {
    const char *start;
    Py_ssize_t positions, count;
    int32_t *drops, *at;
} Steps;

static inline void add(float *restrict to, const float *restrict one, const float *restrict other, Py_ssize_t count)
{
    for (Py_ssize_t i = 0; i < count; i++)
        to[i] = one[i] + other[i];
}

/* In one pass for a few drops. Sums are of float32 each, as if every one had been stored. */
ALWAYS_INLINE void add_steps(float *restrict to, const float *restrict from, const float *restrict owed, Py_ssize_t back,
                             Py_ssize_t drops, Py_ssize_t count)
{
    if (drops == 1)
        add(to, from, owed, count);
    else if (drops == 2)
        for (Py_ssize_t i = 0; i < count; i++)
            to[i] = (from[i] + owed[i]) + owed[i - back];
    else
        for (Py_ssize_t i = 0; i < count; i++)
            to[i] = ((from[i] + owed[i]) + owed[i - back]) + owed[i - 2 * back];
    for (Py_ssize_t drop = 3; drop < drops; drop++)
        for (Py_ssize_t i = 0; i < count; i++)
            to[i] += owed[i - drop * back];
}

/* What is copied next is on its way meanwhile: tokens ahead of the one that is copied, and of the one that is written. */
#define READ_AHEAD 8
#define WRITE_AHEAD 2
#define LINE 64

#if defined(__GNUC__)
#define PREFETCH(address, to_write) __builtin_prefetch(address, to_write)
#else
#define PREFETCH(address, to_write) ((void)(address))
#endif

ALWAYS_INLINE void prefetch(const char *start, Py_ssize_t bytes, const int to_write)
{
    for (Py_ssize_t line = 0; line < bytes; line += LINE)
        PREFETCH(start + line, to_write);
}

/* A call of memcpy for every head of a token would cost more than the copy. */
ALWAYS_INLINE void copy(char *restrict to, const char *restrict from, Py_ssize_t bytes)
{
    Py_ssize_t done = 0;
    for (; done + LINE <= bytes; done += LINE)
        memcpy(to + done, from + done, LINE);
    if (done < bytes)
        memcpy(to + done, from + done, bytes - done);
}

/* Row `row` of `count` of a plane, head by head. `bytes` is a constant where the function is inlined with one. */
ALWAYS_INLINE void copy_row(const Memory *m, Py_ssize_t plane, Py_ssize_t row, Py_ssize_t count, const int64_t *slots,
                            Py_ssize_t filled, const Steps *steps, Py_ssize_t bytes)
{
    const int32_t *drops = steps == NULL ? NULL : steps->drops + row * filled;
    const int32_t *at = steps == NULL ? NULL : steps->at + row * filled;
    Py_ssize_t known = (count - row) * filled - READ_AHEAD; /* columns up to which the token ahead is known */
    for (Py_ssize_t head = 0; head < m->heads; head++) {
        char *to = in_batch(m, plane, row, head, 0);
        const char *of_head = in_slots(m, plane, 0) + head * bytes;
        for (Py_ssize_t column = 0; column < filled; column++, to += bytes) {
            if (column < known)
                prefetch(of_head + slots[column + READ_AHEAD] * m->heads * bytes, bytes, 0);
            const char *from = of_head + slots[column] * m->heads * bytes;
            if (drops == NULL || drops[column] == 0)
                copy(to, from, bytes);
            else {
                Py_ssize_t owed = (plane * (steps->positions + 1) + at[column]) * m->heads + head;
                add_steps((float *)to, (const float *)from, (const float *)(steps->start + owed * bytes),
                          steps->count * m->heads * bytes / 4, drops[column], bytes / 4);
            }
        }
    }
}

/* The first `count` rows of the batch. */
WIDE static void copy_rows(const Memory *m, Py_ssize_t count, const int64_t *slots, Py_ssize_t filled,
                           const Steps *steps)
{
    for (Py_ssize_t plane = 0; plane < m->planes; plane++)
        for (Py_ssize_t row = 0; row < count; row++) {
            const int64_t *of_row = slots + row * filled;
            switch (m->bytes) {
            case 128: copy_row(m, plane, row, count, of_row, filled, steps, 128); break;
            case 256: copy_row(m, plane, row, count, of_row, filled, steps, 256); break;
            default: copy_row(m, plane, row, count, of_row, filled, steps, m->bytes);
            }
        }
}

/* What every token of rows that are owed it has outlived. A token's position counts from its row's first. */
static int find_steps(Steps *steps, PyObject *owed, PyObject *owing, const Tables *tables, const int64_t *slots,
                      Py_ssize_t rows, Py_ssize_t filled)
{
    if (!PyList_Check(owed) || PyList_GET_SIZE(owed) != rows || steps->count < 1) {
        PyErr_SetString(PyExc_ValueError, "owed must be a list of one for each row, and drop at least 1");
        return 0;
    }
    steps->drops = PyMem_Calloc(rows * filled + 1, sizeof(int32_t));
    steps->at = PyMem_Calloc(rows * filled + 1, sizeof(int32_t));
    if (steps->drops == NULL || steps->at == NULL)
        return PyErr_NoMemory() != NULL;
    for (Py_ssize_t row = 0, i = 0; row < rows; row++) {
        Py_ssize_t position = 0;
        for (Py_ssize_t column = 0; column < filled; column++, i++) {
            if (slots[i] == 0 || PyList_GET_ITEM(owed, row) != owing)
                continue;
            int64_t written = tables->written_at[slots[i]];
            if (!within(written, steps->positions, "position"))
                return 0;
            if (written - position >= steps->count) {
                steps->drops[i] = (int32_t)((written - position) / steps->count);
                steps->at[i] = (int32_t)(written - steps->count);
            }
            position++;
        }
    }
    return 1;
}

static PyObject *gather_tokens(PyObject *const *arguments, Steps *steps)
{
    Memory m;
    Py_ssize_t numbers[4], count;
    if (!memory_of(arguments, &m) || !integers(arguments + 3, 4, numbers))
        return NULL;
    if (!Py_IS_TYPE(arguments[7], tables_type)) {
        PyErr_Format(PyExc_TypeError, "tables must be Tables, got %s", Py_TYPE(arguments[7])->tp_name);
        return NULL;
    }
    const Tables *tables = (const Tables *)arguments[7];
    Py_ssize_t end = numbers[2], filled = numbers[3];
    m.rows = numbers[0], m.columns = numbers[1];
    if (!within(filled, m.columns + 1, "filled") || !within(end, m.columns + 1, "end") ||
        !within(tables->num_slots, m.num_slots, "slot"))
        return NULL;
    PyObject *result = NULL;
    int64_t *slots = NULL, *rows = NULL;
    Py_BEGIN_CRITICAL_SECTION(arguments[7]);
    rows = rows_of(arguments[8], tables->row_count, &count);
    if (rows != NULL && within(count, m.rows + 1, "row"))
        slots = slots_in_columns(tables, rows, count, end, filled);
    Py_END_CRITICAL_SECTION();
    if (slots == NULL)
        goto done;
    if (steps != NULL && m.bytes % sizeof(float)) {
        PyErr_SetString(PyExc_ValueError, "shape must be of float32");
        goto done;
    }
    if (steps != NULL && !find_steps(steps, arguments[9], arguments[10], tables, slots, count, filled))
        goto done;
    if (m.planes * count * m.heads * filled * m.bytes < LEAST_BYTES_WITHOUT_GIL)
        copy_rows(&m, count, slots, filled, steps);
    else {
        Py_BEGIN_ALLOW_THREADS
        copy_rows(&m, count, slots, filled, steps);
        Py_END_ALLOW_THREADS
    }
    result = Py_NewRef(Py_None);
done:
    PyMem_Free(slots);
    PyMem_Free(rows);
    return result;
}

/* gather(slots, shape, batch, batch_rows, columns, end, filled, tables, rows)
 *
 * The tokens of some rows of the tables, each row's newest before column `end`, into columns 0 to `filled` of the first
 * rows of a batch of `batch_rows` and `columns`. What no row fills is slot 0, which is zeros.
 */
static PyObject *gather(PyObject *module, PyObject *const *arguments, Py_ssize_t count)
{
    return enough(count, 9) ? gather_tokens(arguments, NULL) : NULL;
}

/* gather_stepwise(slots, shape, batch, batch_rows, columns, end, filled, tables, rows, owed, owing, difference,
 *                 positions, drop)
 *
 * As `gather`; tokens of rows whose item of the list `owed` is `owing` have added what they are owed for every `drop`
 * positions since they were written.
 */
static PyObject *gather_stepwise(PyObject *module, PyObject *const *arguments, Py_ssize_t count)
{
    Py_ssize_t numbers[2];
    if (!enough(count, 14) || !integers(arguments + 12, 2, numbers))
        return NULL;
    Steps steps = {PyLong_AsVoidPtr(arguments[11]), numbers[0], numbers[1], NULL, NULL};
    PyObject *result = PyErr_Occurred() ? NULL : gather_tokens(arguments, &steps);
    PyMem_Free(steps.drops);
    PyMem_Free(steps.at);
    return result;
}

/* Differences [planes, kept, heads] of float32, added to the first `corrected` tokens, `kept` at a time. */
typedef struct {
    const char *start;
    Py_ssize_t plane_bytes, kept, corrected;
} Differences;

WIDE static void write_tokens(const Memory *m, const int64_t *rows, const int64_t *columns, const Slots *slots,
                              const Differences *d)
{
    Py_ssize_t bytes = m->bytes, step = m->columns * bytes, last = slots->count - 1;
    for (Py_ssize_t plane = 0; plane < m->planes; plane++)
        for (Py_ssize_t i = 0; i <= last; i++) {
            prefetch(in_slots(m, plane, slot_of(slots, i + WRITE_AHEAD < last ? i + WRITE_AHEAD : last)), m->heads * bytes, 1);
            char *to = in_slots(m, plane, slot_of(slots, i));
            const char *from = in_batch(m, plane, rows[i], 0, columns[i]);
            const char *more = i < d->corrected ? d->start + plane * d->plane_bytes + i % d->kept * m->heads * bytes : NULL;
            for (Py_ssize_t head = 0; head < m->heads; head++, to += bytes, from += step)
                if (more == NULL)
                    copy(to, from, bytes);
                else
                    add((float *)to, (const float *)from, (const float *)(more + head * bytes), bytes / 4);
        }
}

/* scatter(slots, shape, batch, rows_of_batch, columns_of_batch, difference, plane_bytes, kept, corrected,
 *         rows, columns, taken)
 *
 * Token `columns[i]` of row `rows[i]` of a batch into slot `taken[i]`, for every i.
 */
static PyObject *scatter(PyObject *module, PyObject *const *arguments, Py_ssize_t count)
{
    Memory m;
    Py_ssize_t numbers[5];
    if (!enough(count, 12) || !memory_of(arguments, &m) || !integers(arguments + 3, 2, numbers) ||
        !integers(arguments + 6, 3, numbers + 2))
        return NULL;
    m.rows = numbers[0], m.columns = numbers[1];
    Differences d = {PyLong_AsVoidPtr(arguments[5]), numbers[2], numbers[3], numbers[4]};
    if (PyErr_Occurred())
        return NULL;
    Py_buffer rows, columns;
    Slots slots;
    if (!slots_of(arguments[11], &slots, m.num_slots))
        return NULL;
    PyObject *result = NULL;
    if (!array_of(arguments[9], &rows, 1, INT64, 0))
        goto no_rows;
    if (!array_of(arguments[10], &columns, 1, INT64, 0))
        goto no_columns;
    if (rows.shape[0] != slots.count || columns.shape[0] != slots.count || (d.corrected && d.kept < 1))
        PyErr_SetString(PyExc_ValueError, "rows, columns and slots must be as many");
    else if (all_within(&rows, m.rows, "row") && all_within(&columns, m.columns, "column")) {
        if (m.planes * slots.count * m.heads * m.bytes < LEAST_BYTES_WITHOUT_GIL)
            write_tokens(&m, rows.buf, columns.buf, &slots, &d);
        else {
            Py_BEGIN_ALLOW_THREADS
            write_tokens(&m, rows.buf, columns.buf, &slots, &d);
            Py_END_ALLOW_THREADS
        }
        result = Py_NewRef(Py_None);
    }
    PyBuffer_Release(&columns);
no_columns:
    PyBuffer_Release(&rows);
no_rows:
    PyBuffer_Release(&slots.view);
    return result;
}

#endif
