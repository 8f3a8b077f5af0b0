/* The loops over tokens and slots, in host memory: each does in one call what `numpy` and `torch` do in several.
 *
 * Optional. Every function has a counterpart in Python that leaves the same bytes, in `tensors.py`, `ledger.py` and
 * `keys.py`; `native.py` says which is used. Who calls it holds the locks that the counterpart needs, and keeps alive
 * the contiguous tensors whose addresses it passes. Indices are checked before anything is written.
 */

#define PY_SSIZE_T_CLEAN
#include <Python.h>
#include <stdint.h>
#include <string.h>
#ifdef __linux__
#include <sys/mman.h>
#endif

/* Handing the GIL over costs more than a shorter copy. */
#define LEAST_BYTES_WITHOUT_GIL 262144

/* Arguments ------------------------------------------------------------------------------------------------------- */

static int enough(Py_ssize_t count, Py_ssize_t expected)
{
    if (count == expected)
        return 1;
    PyErr_Format(PyExc_TypeError, "expected %zd arguments, got %zd", expected, count);
    return 0;
}

static int integers(PyObject *const *arguments, Py_ssize_t count, Py_ssize_t *out)
{
    for (Py_ssize_t i = 0; i < count; i++) {
        out[i] = PyLong_AsSsize_t(arguments[i]);
        if (out[i] == -1 && PyErr_Occurred())
            return 0;
    }
    return 1;
}

/* View(array): an array for many calls, each of which would ask it for its memory and shape anew. */
typedef struct {
    PyObject_HEAD
    Py_buffer buffer;
} View;

static PyTypeObject *view_type;

static PyObject *view_new(PyTypeObject *type, PyObject *arguments, PyObject *keywords)
{
    static char *names[] = {"array", NULL};
    PyObject *array;
    if (!PyArg_ParseTupleAndKeywords(arguments, keywords, "O", names, &array))
        return NULL;
    View *view = (View *)type->tp_alloc(type, 0);
    if (view == NULL)
        return NULL;
    if (PyObject_GetBuffer(array, &view->buffer, PyBUF_ND | PyBUF_FORMAT) < 0) {
        view->buffer.obj = NULL;
        Py_DECREF(view);
        return NULL;
    }
    return (PyObject *)view;
}

static void view_dealloc(View *view)
{
    PyTypeObject *type = Py_TYPE(view);
    PyBuffer_Release(&view->buffer);
    type->tp_free(view);
    Py_DECREF(type);
}

static PyType_Slot view_slots[] = {{Py_tp_new, view_new}, {Py_tp_dealloc, view_dealloc}, {0, NULL}};

static PyType_Spec view_spec = {"concurrent_kv._native.View", sizeof(View), 0, Py_TPFLAGS_DEFAULT, view_slots};

/* A C contiguous array, or a View of one; `kinds` are the formats of its items that are accepted. Releasing a view of
 * none is harmless. */
static int array_of(PyObject *object, Py_buffer *view, int dimensions, const char *kinds, int flags)
{
    if (Py_TYPE(object) == view_type) {
        *view = ((View *)object)->buffer;
        view->obj = NULL; /* the View releases it */
        if (flags & PyBUF_WRITABLE && view->readonly) {
            PyErr_SetString(PyExc_BufferError, "expected a View of an array that can be written to");
            return 0;
        }
    }
    else if (PyObject_GetBuffer(object, view, PyBUF_ND | PyBUF_FORMAT | flags) < 0) {
        view->obj = NULL;
        return 0;
    }
    if (view->ndim == dimensions && strlen(view->format) == 1 && strchr(kinds, view->format[0]) != NULL)
        return 1;
    PyErr_Format(PyExc_ValueError, "expected an array of %d dimensions of '%s', got %d of '%s'", dimensions, kinds,
                 view->ndim, view->format);
    PyBuffer_Release(view);
    return 0;
}

#define INT64 (sizeof(long) == 8 ? "lq" : "q")
#define INT32 (sizeof(long) == 4 ? "il" : "i")

static int within(int64_t index, Py_ssize_t bound, const char *what)
{
    if (index >= 0 && index < bound)
        return 1;
    PyErr_Format(PyExc_IndexError, "%s must be less than %zd, got %lld", what, bound, (long long)index);
    return 0;
}

static int all_within(const Py_buffer *view, Py_ssize_t bound, const char *what)
{
    const int64_t *index = view->buf;
    for (Py_ssize_t i = 0; i < view->len / 8; i++)
        if (!within(index[i], bound, what))
            return 0;
    return 1;
}

/* A list of row numbers, ints, as an array of its own, which the caller frees. Other numbers could change the list. */
static int64_t *rows_of(PyObject *list, Py_ssize_t bound, Py_ssize_t *count)
{
    if (!PyList_Check(list)) {
        PyErr_Format(PyExc_TypeError, "rows must be a list, got %s", Py_TYPE(list)->tp_name);
        return NULL;
    }
    *count = PyList_GET_SIZE(list);
    int64_t *rows = PyMem_Malloc((*count + 1) * sizeof(int64_t));
    if (rows == NULL) {
        PyErr_NoMemory();
        return NULL;
    }
    for (Py_ssize_t i = 0; i < *count; i++) {
        PyObject *row = PyList_GET_ITEM(list, i);
        if (!PyLong_Check(row))
            PyErr_Format(PyExc_TypeError, "rows must be ints, got %s", Py_TYPE(row)->tp_name);
        rows[i] = PyLong_Check(row) ? PyLong_AsLongLong(row) : -1;
        if ((rows[i] == -1 && PyErr_Occurred()) || !within(rows[i], bound, "row")) {
            PyMem_Free(rows);
            return NULL;
        }
    }
    return rows;
}

/* Slots: an int64 array, or a range of step 1. */
typedef struct {
    Py_buffer view; /* of none for a range */
    const int64_t *array;
    int64_t first;
    Py_ssize_t count;
} Slots;

static inline int64_t slot_of(const Slots *slots, Py_ssize_t i)
{
    return slots->array == NULL ? slots->first + i : slots->array[i];
}

static int slots_of(PyObject *object, Slots *slots, Py_ssize_t bound)
{
    slots->view.obj = NULL;
    slots->array = NULL;
    if (!PyRange_Check(object)) {
        if (!array_of(object, &slots->view, 1, INT64, 0))
            return 0;
        slots->array = slots->view.buf;
        slots->count = slots->view.shape[0];
        if (all_within(&slots->view, bound, "slot"))
            return 1;
        PyBuffer_Release(&slots->view);
        return 0;
    }
    slots->count = PyObject_Length(object);
    if (slots->count < 1)
        return slots->count == 0;
    PyObject *ends[2] = {PySequence_GetItem(object, 0), PySequence_GetItem(object, slots->count - 1)};
    int64_t numbers[2] = {-1, -1};
    for (int i = 0; i < 2; i++) {
        if (ends[i] != NULL)
            numbers[i] = PyLong_AsLongLong(ends[i]);
        Py_XDECREF(ends[i]);
    }
    if (PyErr_Occurred() || !within(numbers[0], bound, "slot") || !within(numbers[1], bound, "slot"))
        return 0;
    slots->first = numbers[0];
    if (numbers[1] - numbers[0] == slots->count - 1)
        return 1;
    PyErr_SetString(PyExc_ValueError, "a range of slots must have step 1");
    return 0;
}

/* Copies ---------------------------------------------------------------------------------------------------------- */

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

/* `bytes` is a constant where the function is inlined with one, which makes the copy a few instructions. */
static inline void copy_row(const Memory *m, Py_ssize_t plane, Py_ssize_t row, const int64_t *slots, Py_ssize_t filled,
                            Py_ssize_t bytes)
{
    for (Py_ssize_t head = 0; head < m->heads; head++) {
        char *to = in_batch(m, plane, row, head, 0);
        for (Py_ssize_t column = 0; column < filled; column++, to += bytes)
            memcpy(to, in_slots(m, plane, slots[column]) + head * bytes, bytes);
    }
}

static void copy_rows(const Memory *m, const int64_t *slots, Py_ssize_t filled)
{
    for (Py_ssize_t plane = 0; plane < m->planes; plane++)
        for (Py_ssize_t row = 0; row < m->rows; row++)
            switch (m->bytes) {
            case 128: copy_row(m, plane, row, slots + row * filled, filled, 128); break;
            case 256: copy_row(m, plane, row, slots + row * filled, filled, 256); break;
            default: copy_row(m, plane, row, slots + row * filled, filled, m->bytes);
            }
}

/* gather(slots, shape, batch, columns, end, filled, tables, rows)
 *
 * The tokens of the slot tables `tables[rows]`, each row's newest before column `end`, into columns 0 to `filled` of a
 * batch of `columns`. What no table fills is slot 0, which is zeros.
 */
static PyObject *gather(PyObject *module, PyObject *const *arguments, Py_ssize_t count)
{
    Memory m;
    Py_ssize_t numbers[3];
    Py_buffer tables;
    if (!enough(count, 8) || !memory_of(arguments, &m) || !integers(arguments + 3, 3, numbers) ||
        !array_of(arguments[6], &tables, 2, INT64, 0))
        return NULL;
    Py_ssize_t end = numbers[1], filled = numbers[2], window = tables.shape[1];
    m.columns = numbers[0];
    PyObject *result = NULL;
    int64_t *slots = NULL, *rows = rows_of(arguments[7], tables.shape[0], &m.rows);
    if (rows == NULL || !within(filled, m.columns + 1, "filled") || !within(end, window + 1, "end"))
        goto done;
    slots = PyMem_Calloc(m.rows * filled + 1, sizeof(int64_t));
    if (slots == NULL) {
        PyErr_NoMemory();
        goto done;
    }
    for (Py_ssize_t row = 0; row < m.rows; row++) {
        const int64_t *table = (const int64_t *)tables.buf + (rows[row] + 1) * window - end;
        for (Py_ssize_t column = 0; column < end && column < filled; column++) {
            if (!within(table[column], m.num_slots, "slot"))
                goto done;
            slots[row * filled + column] = table[column];
        }
    }
    if (m.planes * m.rows * m.heads * filled * m.bytes < LEAST_BYTES_WITHOUT_GIL)
        copy_rows(&m, slots, filled);
    else {
        Py_BEGIN_ALLOW_THREADS
        copy_rows(&m, slots, filled);
        Py_END_ALLOW_THREADS
    }
    result = Py_NewRef(Py_None);
done:
    PyMem_Free(slots);
    PyMem_Free(rows);
    PyBuffer_Release(&tables);
    return result;
}

/* Differences [planes, kept, heads] of float32, added to the first `corrected` tokens, `kept` at a time. */
typedef struct {
    const char *start;
    Py_ssize_t plane_bytes, kept, corrected;
} Differences;

static inline void add(float *restrict to, const float *restrict one, const float *restrict other, Py_ssize_t count)
{
    for (Py_ssize_t i = 0; i < count; i++)
        to[i] = one[i] + other[i];
}

static void write_tokens(const Memory *m, const int64_t *rows, const int64_t *columns, const Slots *slots,
                         const Differences *d)
{
    Py_ssize_t bytes = m->bytes, step = m->columns * bytes;
    for (Py_ssize_t plane = 0; plane < m->planes; plane++)
        for (Py_ssize_t i = 0; i < slots->count; i++) {
            char *to = in_slots(m, plane, slot_of(slots, i));
            const char *from = in_batch(m, plane, rows[i], 0, columns[i]);
            const char *more = i < d->corrected ? d->start + plane * d->plane_bytes + i % d->kept * m->heads * bytes : NULL;
            for (Py_ssize_t head = 0; head < m->heads; head++, to += bytes, from += step)
                if (more == NULL)
                    memcpy(to, from, bytes);
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

/* Slot tables ------------------------------------------------------------------------------------------------------ */

/* share(tables, rows, columns, shared, own, taken, positions, written_at, out)
 *
 * Slot tables `out` of entries that share slots with the entries of `tables[rows]`: column c is `columns[c]` of the
 * parent's where `shared[entry, c]`, the next of `taken` where `own[entry, c]`, and 0 elsewhere. `positions` are those
 * of the tokens in `taken`, and go into `written_at[slot]`.
 */
static PyObject *share(PyObject *module, PyObject *const *arguments, Py_ssize_t count)
{
    enum { TABLES, COLUMNS, SHARED, OWN, POSITIONS, WRITTEN_AT, OUT, ARRAYS };
    static const int dimensions[ARRAYS] = {2, 1, 2, 2, 1, 1, 2}, at[ARRAYS] = {0, 2, 3, 4, 6, 7, 8};
    Py_buffer a[ARRAYS];
    Slots taken = {.view = {.obj = NULL}};
    if (!enough(count, ARRAYS + 2))
        return NULL;
    int got = 0;
    while (got < ARRAYS && array_of(arguments[at[got]], &a[got], dimensions[got],
                                    got == SHARED || got == OWN ? "?" : INT64, got >= WRITTEN_AT ? PyBUF_WRITABLE : 0))
        got++;
    PyObject *result = NULL;
    int64_t *rows = NULL;
    Py_ssize_t entries;
    if (got < ARRAYS || !slots_of(arguments[5], &taken, a[WRITTEN_AT].shape[0]) ||
        (rows = rows_of(arguments[1], a[TABLES].shape[0], &entries)) == NULL)
        goto done;
    Py_ssize_t window = a[TABLES].shape[1], tokens = taken.count, next = 0;
    const char *shared = a[SHARED].buf, *own = a[OWN].buf;
    Py_ssize_t cells = entries * window, owned = 0;
    int fits = a[COLUMNS].shape[0] == window && a[POSITIONS].shape[0] == tokens && a[SHARED].len == cells &&
               a[OWN].len == cells && a[OUT].len == cells * 8;
    for (Py_ssize_t i = 0; fits && i < cells; i++)
        owned += own[i] != 0;
    if (!fits || owned != tokens) {
        PyErr_SetString(PyExc_ValueError, "arrays must be as many entries, columns and tokens");
        goto done;
    }
    if (!all_within(&a[COLUMNS], window, "column"))
        goto done;
    const int64_t *tables = a[TABLES].buf, *columns = a[COLUMNS].buf, *positions = a[POSITIONS].buf;
    int64_t *written_at = a[WRITTEN_AT].buf, *out = a[OUT].buf;
    for (Py_ssize_t i = 0; i < tokens; i++)
        written_at[slot_of(&taken, i)] = positions[i];
    for (Py_ssize_t entry = 0; entry < entries; entry++)
        for (Py_ssize_t column = 0; column < window; column++, own++, shared++)
            *out++ = *own ? slot_of(&taken, next++) : *shared ? tables[rows[entry] * window + columns[column]] : 0;
    result = Py_NewRef(Py_None);
done:
    PyMem_Free(rows);
    PyBuffer_Release(&taken.view);
    while (got)
        PyBuffer_Release(&a[--got]);
    return result;
}

/* enter(tables, rows, counts, new) -> tails
 *
 * Put the slot tables `new` into `tables[rows]` and count one more entry for each of their slots but slot 0; the last
 * slot of each.
 */
static PyObject *enter(PyObject *module, PyObject *const *arguments, Py_ssize_t count)
{
    Py_buffer a[3];
    if (!enough(count, 4))
        return NULL;
    int got = 0;
    if (array_of(arguments[0], &a[0], 2, INT64, PyBUF_WRITABLE) && ++got &&
        array_of(arguments[2], &a[1], 1, INT32, PyBUF_WRITABLE) && ++got && array_of(arguments[3], &a[2], 2, INT64, 0))
        ++got;
    PyObject *tails = NULL;
    int64_t *rows = NULL;
    Py_ssize_t entries;
    if (got < 3 || !all_within(&a[2], a[1].shape[0], "slot") ||
        (rows = rows_of(arguments[1], a[0].shape[0], &entries)) == NULL)
        goto done;
    Py_ssize_t window = a[0].shape[1];
    if (a[2].shape[0] != entries || a[2].shape[1] != window || window < 1) {
        PyErr_SetString(PyExc_ValueError, "new must be [rows, window]");
        goto done;
    }
    tails = PyList_New(entries);
    const int64_t *new = a[2].buf;
    for (Py_ssize_t i = 0; tails != NULL && i < entries; i++) {
        PyObject *tail = PyLong_FromLongLong(new[(i + 1) * window - 1]);
        if (tail == NULL)
            Py_CLEAR(tails);
        else
            PyList_SET_ITEM(tails, i, tail);
    }
    if (tails == NULL)
        goto done;
    int32_t *counts = a[1].buf;
    for (Py_ssize_t i = 0; i < entries; i++)
        memcpy((int64_t *)a[0].buf + rows[i] * window, new + i * window, window * sizeof(int64_t));
    for (Py_ssize_t i = 0; i < entries * window; i++)
        counts[new[i]] += new[i] != 0;
done:
    PyMem_Free(rows);
    while (got)
        PyBuffer_Release(&a[--got]);
    return tails;
}

/* mark(array, slots, number): `array[slots] = number`, of an int32 array. */
static PyObject *mark(PyObject *module, PyObject *const *arguments, Py_ssize_t count)
{
    Py_ssize_t number;
    Py_buffer array;
    Slots slots;
    if (!enough(count, 3) || !integers(arguments + 2, 1, &number) ||
        !array_of(arguments[0], &array, 1, INT32, PyBUF_WRITABLE))
        return NULL;
    PyObject *result = NULL;
    if (number != (int32_t)number)
        PyErr_Format(PyExc_OverflowError, "number must be an int32, got %zd", number);
    else if (slots_of(arguments[1], &slots, array.shape[0])) {
        for (Py_ssize_t i = 0; i < slots.count; i++)
            ((int32_t *)array.buf)[slot_of(&slots, i)] = (int32_t)number;
        PyBuffer_Release(&slots.view);
        result = Py_NewRef(Py_None);
    }
    PyBuffer_Release(&array);
    return result;
}

/* Hashes ----------------------------------------------------------------------------------------------------------- */

/* XXH64 as specified in https://github.com/Cyan4973/xxHash/blob/dev/doc/xxhash_spec.md, with seed 0. */
#define PRIME_1 0x9E3779B185EBCA87ULL
#define PRIME_2 0xC2B2AE3D27D4EB4FULL
#define PRIME_3 0x165667B19E3779F9ULL
#define PRIME_4 0x85EBCA77C2B2AE63ULL
#define PRIME_5 0x27D4EB2F165667C5ULL

static inline uint64_t rotated(uint64_t value, int bits)
{
    return value << bits | value >> (64 - bits);
}

static inline uint64_t word(const unsigned char *at, int bytes)
{
    uint64_t value = 0;
    for (int i = 0; i < bytes; i++)
        value |= (uint64_t)at[i] << (8 * i);
    return value;
}

static inline uint64_t one_round(uint64_t lane, uint64_t input)
{
    return rotated(lane + input * PRIME_2, 31) * PRIME_1;
}

static uint64_t xxh64(const unsigned char *at, Py_ssize_t bytes)
{
    const unsigned char *end = at + bytes;
    uint64_t hash = PRIME_5;
    if (bytes >= 32) {
        uint64_t lanes[4] = {PRIME_1 + PRIME_2, PRIME_2, 0, 0 - PRIME_1};
        for (; end - at >= 32; at += 32)
            for (int i = 0; i < 4; i++)
                lanes[i] = one_round(lanes[i], word(at + 8 * i, 8));
        hash = rotated(lanes[0], 1) + rotated(lanes[1], 7) + rotated(lanes[2], 12) + rotated(lanes[3], 18);
        for (int i = 0; i < 4; i++)
            hash = (hash ^ one_round(0, lanes[i])) * PRIME_1 + PRIME_4;
    }
    hash += (uint64_t)bytes;
    for (; end - at >= 8; at += 8)
        hash = rotated(hash ^ one_round(0, word(at, 8)), 27) * PRIME_1 + PRIME_4;
    for (; end - at >= 4; at += 4)
        hash = rotated(hash ^ word(at, 4) * PRIME_1, 23) * PRIME_2 + PRIME_3;
    for (; at < end; at++)
        hash = rotated(hash ^ *at * PRIME_5, 11) * PRIME_1;
    hash = (hash ^ hash >> 33) * PRIME_2;
    hash = (hash ^ hash >> 29) * PRIME_3;
    return hash ^ hash >> 32;
}

static PyObject *hashes_of(const unsigned char *at, Py_ssize_t rows, Py_ssize_t bytes)
{
    if (rows < 0 || bytes < 0) {
        PyErr_SetString(PyExc_ValueError, "rows and bytes must not be negative");
        return NULL;
    }
    PyObject *hashes = PyList_New(rows);
    for (Py_ssize_t row = 0; hashes != NULL && row < rows; row++) {
        uint64_t hash = xxh64(at + row * bytes, bytes);
        PyObject *digits = PyUnicode_New(16, 127);
        if (digits == NULL)
            Py_CLEAR(hashes);
        else {
            for (int i = 15; i >= 0; i--, hash >>= 4)
                PyUnicode_1BYTE_DATA(digits)[i] = "0123456789abcdef"[hash & 15];
            PyList_SET_ITEM(hashes, row, digits);
        }
    }
    return hashes;
}

/* hash_rows(bytes, rows) -> the hash of each of `rows` rows of as many bytes, as 16 hexadecimal digits. */
static PyObject *hash_rows(PyObject *module, PyObject *const *arguments, Py_ssize_t count)
{
    Py_ssize_t rows;
    Py_buffer view;
    if (!enough(count, 2) || !integers(arguments + 1, 1, &rows) ||
        PyObject_GetBuffer(arguments[0], &view, PyBUF_SIMPLE) < 0)
        return NULL;
    PyObject *hashes = NULL;
    if (rows > 0 && view.len % rows)
        PyErr_Format(PyExc_ValueError, "%zd bytes are no %zd equal rows", view.len, rows);
    else
        hashes = hashes_of(view.buf, rows, rows ? view.len / rows : 0);
    PyBuffer_Release(&view);
    return hashes;
}

/* hash_memory(address, rows, bytes): as `hash_rows`, of rows of `bytes` bytes. */
static PyObject *hash_memory(PyObject *module, PyObject *const *arguments, Py_ssize_t count)
{
    Py_ssize_t numbers[2];
    if (!enough(count, 3) || !integers(arguments + 1, 2, numbers))
        return NULL;
    const unsigned char *at = PyLong_AsVoidPtr(arguments[0]);
    return PyErr_Occurred() ? NULL : hashes_of(at, numbers[0], numbers[1]);
}

/* Memory ------------------------------------------------------------------------------------------------------------ */

/* advise_huge_pages(address, bytes): fewer pages to look up, where the system has larger ones and agrees. */
static PyObject *advise_huge_pages(PyObject *module, PyObject *const *arguments, Py_ssize_t count)
{
    Py_ssize_t bytes;
    if (!enough(count, 2) || !integers(arguments + 1, 1, &bytes))
        return NULL;
    uintptr_t address = (uintptr_t)PyLong_AsVoidPtr(arguments[0]);
    if (PyErr_Occurred())
        return NULL;
#ifdef MADV_HUGEPAGE
    uintptr_t page = 4096, first = (address + page - 1) / page * page, last = (address + bytes) / page * page;
    if (last > first)
        madvise((void *)first, last - first, MADV_HUGEPAGE);
#endif
    Py_RETURN_NONE;
}

/* ------------------------------------------------------------------------------------------------------------------- */

#define FUNCTION(name) {#name, (PyCFunction)(void (*)(void))name, METH_FASTCALL, NULL}

static PyMethodDef functions[] = {
    FUNCTION(gather), FUNCTION(scatter), FUNCTION(share), FUNCTION(enter), FUNCTION(mark), FUNCTION(hash_rows), FUNCTION(hash_memory),
    FUNCTION(advise_huge_pages), {NULL, NULL, 0, NULL},
};

static int add_types(PyObject *module)
{
    if (view_type == NULL && (view_type = (PyTypeObject *)PyType_FromSpec(&view_spec)) == NULL)
        return -1;
    return PyModule_AddType(module, view_type);
}

static PyModuleDef_Slot slots[] = {
    {Py_mod_exec, add_types},
#ifdef Py_GIL_DISABLED
    {Py_mod_gil, Py_MOD_GIL_NOT_USED},
#endif
    {0, NULL},
};

static struct PyModuleDef definition = {
    PyModuleDef_HEAD_INIT, .m_name = "_native", .m_methods = functions, .m_slots = slots,
};

PyMODINIT_FUNC PyInit__native(void)
{
    return PyModuleDef_Init(&definition);
}
