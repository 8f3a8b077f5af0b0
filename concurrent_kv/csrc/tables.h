/* `Tables` and `Uses`: which slots each row names, in pages that rows share, and how many name a slot. `in_runs`.
 * Their counterparts are in `books/tables.py`, which says what each method does.
 *
 * Every method looks at the tables, and at what `Uses` count of them, in the critical section of the tables. Nothing there
 * waits or runs Python code, which would let another thread in halfway.
 */

#ifndef CONCURRENT_KV_TABLES_H
#define CONCURRENT_KV_TABLES_H

#include "arguments.h"

#define LONGEST_PAGE 64 /* slots of the only page of a short window */
#define PAGE 32
#define MOST 2 /* rows of one page that count: one, or more */

/* A row of slots. A page that several rows have is full, but for what stands before `start` in a row's first. */
typedef struct {
    int32_t start, length, pages; /* of the first page, what is not the row's; a free row has no length */
    union {
        int32_t one, *many;
    } page;
} Row;

static inline const int32_t *pages_of(const Row *row)
{
    return row->pages > 1 ? row->page.many : &row->page.one;
}

/* How many rows name each page, and the sum over its pages, MOST of each, of every slot. */
typedef struct {
    int32_t *pages, *slots;
    Py_ssize_t page_count, used, shared; /* slots that count more than 0, and more than 1 */
} Counts;

typedef struct {
    PyObject_HEAD
    Py_ssize_t num_slots, width;
    Row *rows;
    int32_t *slots, *free_rows, *free_pages; /* slots: of all pages */
    int32_t *written_at;
    Py_ssize_t row_count, free_row_count, page_count, free_page_count;
    Counts counts;
} Tables;

typedef struct {
    PyObject_HEAD
    Tables *tables;
    Counts counts;
} Uses;

static PyTypeObject *tables_type, *uses_type;

/* The method `name`, which is `name_inside` in the critical section of `tables`. */
#define INSIDE(name, Self, tables)                                                                                    \
    static PyObject *name(Self *self, PyObject *argument)                                                              \
    {                                                                                                                  \
        PyObject *result;                                                                                              \
        Py_BEGIN_CRITICAL_SECTION(tables);                                                                             \
        result = name##_inside(self, argument);                                                                        \
        Py_END_CRITICAL_SECTION();                                                                                     \
        return result;                                                                                                 \
    }
#define INSIDE_TABLES(name) INSIDE(tables_##name, Tables, self)
#define INSIDE_USES(name) INSIDE(uses_##name, Uses, self->tables)

/* The attribute `name`, a number of `counts`, likewise. */
#define NUMBER_INSIDE(kind, Self, tables, name)                                                                        \
    static PyObject *kind##_##name(Self *self, void *closure)                                                          \
    {                                                                                                                  \
        Py_ssize_t number;                                                                                             \
        Py_BEGIN_CRITICAL_SECTION(tables);                                                                             \
        number = self->counts.name;                                                                                    \
        Py_END_CRITICAL_SECTION();                                                                                     \
        return PyLong_FromSsize_t(number);                                                                             \
    }

static int grow(void **array, Py_ssize_t before, Py_ssize_t count, Py_ssize_t size)
{
    void *grown = PyMem_Realloc(*array, count * size);
    if (grown == NULL)
        return PyErr_NoMemory() != NULL;
    memset((char *)grown + before * size, 0, (count - before) * size);
    *array = grown;
    return 1;
}

static int grow_counts(Counts *counts, Py_ssize_t pages)
{
    if (pages > counts->page_count) {
        if (!grow((void **)&counts->pages, counts->page_count, pages, sizeof(int32_t)))
            return 0;
        counts->page_count = pages;
    }
    return 1;
}

static int new_counts(Counts *counts, Py_ssize_t num_slots)
{
    counts->slots = PyMem_Calloc(num_slots + 1, sizeof(int32_t));
    return counts->slots != NULL || PyErr_NoMemory() != NULL;
}

/* One row more or less that names a page; the slots that none names any more are written to `unnamed`. Cannot fail. */
static void count_page(Counts *counts, const Tables *tables, int32_t page, int change, int64_t **unnamed)
{
    int32_t before = counts->pages[page], after = before + change;
    counts->pages[page] = after;
    if ((before < MOST ? before : MOST) == (after < MOST ? after : MOST))
        return;
    const int32_t *slots = tables->slots + (Py_ssize_t)page * tables->width;
    for (Py_ssize_t i = 0; i < tables->width; i++) {
        if (slots[i] == 0)
            continue;
        int32_t was = counts->slots[slots[i]], is = was + change;
        counts->slots[slots[i]] = is;
        counts->used += (is > 0) - (was > 0);
        counts->shared += (is > 1) - (was > 1);
        if (is == 0 && unnamed != NULL)
            *(*unnamed)++ = slots[i];
    }
}

static void count_rows(Counts *counts, const Tables *tables, const int64_t *rows, Py_ssize_t number, int change,
                       int64_t **unnamed)
{
    for (Py_ssize_t i = 0; i < number; i++) {
        const Row *row = tables->rows + rows[i];
        for (int32_t page = 0; page < row->pages; page++)
            count_page(counts, tables, pages_of(row)[page], change, unnamed);
    }
}

/* Slots in the pages of some rows, at most. */
static Py_ssize_t most_slots(const Tables *tables, const int64_t *rows, Py_ssize_t number)
{
    Py_ssize_t pages = 0;
    for (Py_ssize_t i = 0; i < number; i++)
        pages += tables->rows[rows[i]].pages;
    return pages * tables->width;
}

/* The numbers of rows, all of them taken; or NULL, with an exception set. The caller frees it. */
static int64_t *taken_rows(const Tables *tables, PyObject *list, Py_ssize_t *number)
{
    int64_t *rows = rows_of(list, tables->row_count, number);
    for (Py_ssize_t i = 0; rows != NULL && i < *number; i++)
        if (tables->rows[rows[i]].length == 0) {
            PyErr_Format(PyExc_IndexError, "row %lld is free", (long long)rows[i]);
            PyMem_Free(rows);
            rows = NULL;
        }
    return rows;
}

/* Take rows out of the counts, into a bytearray of the int64 slots that none names any more. */
static PyObject *uncount(Counts *counts, const Tables *tables, const int64_t *rows, Py_ssize_t number)
{
    Py_ssize_t most = most_slots(tables, rows, number);
    if (most > counts->used)
        most = counts->used;
    PyObject *unnamed = PyByteArray_FromStringAndSize(NULL, most * (Py_ssize_t)sizeof(int64_t));
    if (unnamed == NULL)
        return NULL;
    int64_t *first = (int64_t *)PyByteArray_AS_STRING(unnamed), *next = first;
    count_rows(counts, tables, rows, number, -1, &next);
    if (PyByteArray_Resize(unnamed, (char *)next - (char *)first) < 0)
        PyErr_Clear(), Py_SET_SIZE(unnamed, (char *)next - (char *)first); /* it only needs to be smaller */
    return unnamed;
}

/* Slots that some rows name and no others: what is not in use while these are not counted. */
static Py_ssize_t exclusive_of(Counts *counts, const Tables *tables, const int64_t *rows, Py_ssize_t number)
{
    Py_ssize_t used = counts->used;
    count_rows(counts, tables, rows, number, -1, NULL);
    Py_ssize_t exclusive = used - counts->used;
    count_rows(counts, tables, rows, number, 1, NULL);
    return exclusive;
}

static PyObject *weights_of(const Counts *counts, PyObject *object, Py_ssize_t bound)
{
    Slots slots;
    if (!slots_of(object, &slots, bound))
        return NULL;
    PyObject *weights = PyByteArray_FromStringAndSize(NULL, slots.count * (Py_ssize_t)sizeof(int32_t));
    for (Py_ssize_t i = 0; weights != NULL && i < slots.count; i++)
        ((int32_t *)PyByteArray_AS_STRING(weights))[i] = counts->slots[slot_of(&slots, i)];
    PyBuffer_Release(&slots.view);
    return weights;
}

static PyObject *bytes_of_counts(const Counts *counts, Py_ssize_t num_slots)
{
    return Py_BuildValue("(NN)", PyByteArray_FromStringAndSize((char *)counts->pages, counts->page_count * 4),
                         PyByteArray_FromStringAndSize((char *)counts->slots, (num_slots + 1) * 4));
}

/* Tables ------------------------------------------------------------------------------------------------------------ */

static int grow_pages(Tables *tables, Py_ssize_t wanted)
{
    if (tables->free_page_count >= wanted)
        return 1;
    Py_ssize_t before = tables->page_count, count = before + (wanted > before ? wanted : before) + 64;
    if (count > INT32_MAX)
        return PyErr_NoMemory() != NULL;
    if (!grow((void **)&tables->slots, before * tables->width, count * tables->width, sizeof(int32_t)) ||
        !grow((void **)&tables->free_pages, before, count, sizeof(int32_t)) || !grow_counts(&tables->counts, count))
        return 0;
    for (Py_ssize_t page = count - 1; page >= before; page--)
        tables->free_pages[tables->free_page_count++] = (int32_t)page;
    tables->page_count = count;
    return 1;
}

static int grow_rows(Tables *tables, Py_ssize_t wanted)
{
    if (tables->free_row_count >= wanted)
        return 1;
    Py_ssize_t before = tables->row_count, count = before + (wanted > before ? wanted : before) + 64;
    if (count > INT32_MAX)
        return PyErr_NoMemory() != NULL;
    if (!grow((void **)&tables->rows, before, count, sizeof(Row)) ||
        !grow((void **)&tables->free_rows, before, count, sizeof(int32_t)))
        return 0;
    for (Py_ssize_t row = count - 1; row >= (before ? before : 1); row--) /* row 0 names nothing, for good */
        tables->free_rows[tables->free_row_count++] = (int32_t)row;
    tables->row_count = count;
    return 1;
}

static PyObject *tables_new(PyTypeObject *type, PyObject *arguments, PyObject *keywords)
{
    static char *names[] = {"num_slots", "window", NULL};
    Py_ssize_t num_slots, window;
    if (!PyArg_ParseTupleAndKeywords(arguments, keywords, "nn", names, &num_slots, &window))
        return NULL;
    if (num_slots < 0 || num_slots >= INT32_MAX || window < 1 || window >= INT32_MAX) {
        PyErr_Format(PyExc_ValueError, "num_slots and window must be int32, got %zd and %zd", num_slots, window);
        return NULL;
    }
    Tables *tables = (Tables *)type->tp_alloc(type, 0);
    if (tables == NULL)
        return NULL;
    tables->num_slots = num_slots;
    tables->width = window <= LONGEST_PAGE ? window : PAGE;
    tables->written_at = PyMem_Calloc(num_slots + 1, sizeof(int32_t));
    if (tables->written_at == NULL)
        PyErr_NoMemory();
    if (tables->written_at == NULL || !new_counts(&tables->counts, num_slots) || !grow_rows(tables, 1) ||
        !grow_pages(tables, 1)) {
        Py_DECREF(tables);
        return NULL;
    }
    return (PyObject *)tables;
}

static void free_row(Tables *tables, Py_ssize_t number)
{
    Row *row = tables->rows + number;
    if (row->pages > 1)
        PyMem_Free(row->page.many);
    *row = (Row){0};
}

static void free_counts(Counts *counts)
{
    PyMem_Free(counts->pages);
    PyMem_Free(counts->slots);
}

static void tables_dealloc(Tables *tables)
{
    PyTypeObject *type = Py_TYPE(tables);
    for (Py_ssize_t row = 0; row < tables->row_count; row++)
        free_row(tables, row);
    PyMem_Free(tables->rows);
    PyMem_Free(tables->slots);
    PyMem_Free(tables->free_rows);
    PyMem_Free(tables->free_pages);
    PyMem_Free(tables->written_at);
    free_counts(&tables->counts);
    type->tp_free(tables);
    Py_DECREF(type);
}

/* The slot of a row's token, counted from its oldest. */
static inline int32_t token_of(const Tables *tables, const Row *row, Py_ssize_t token)
{
    Py_ssize_t at = row->start + token;
    return tables->slots[(Py_ssize_t)pages_of(row)[at / tables->width] * tables->width + at % tables->width];
}

/* Some of a row's tokens in order, a page at a time. */
static void tokens_of(const Tables *tables, const Row *row, Py_ssize_t first, Py_ssize_t count, int32_t *out)
{
    Py_ssize_t width = tables->width, at = row->start + first;
    while (count > 0) {
        Py_ssize_t piece = width - at % width < count ? width - at % width : count;
        memcpy(out, tables->slots + (Py_ssize_t)pages_of(row)[at / width] * width + at % width, piece * sizeof(int32_t));
        out += piece, at += piece, count -= piece;
    }
}

/* A new row of the newest `kept` tokens of `parent` and of `own` more, in pages from those that are free. */
static int make_row(Tables *tables, Row *row, const Row *parent, Py_ssize_t kept, const Slots *taken, Py_ssize_t first_own,
                    Py_ssize_t own)
{
    Py_ssize_t width = tables->width, length = kept + own;
    Py_ssize_t begin = parent->start + parent->length - kept; /* in the parent's pages */
    /* What it has in common with its parent is shared where it fills a page. A copy shares none: others pay for it. */
    int shares = kept > 0 && own > 0 && length > width;
    row->start = shares ? (int32_t)(begin % width) : 0;
    row->length = (int32_t)length;
    row->pages = (int32_t)((row->start + length + width - 1) / width);
    int32_t *pages = &row->page.one;
    if (row->pages > 1 && (pages = row->page.many = PyMem_Malloc(row->pages * sizeof(int32_t))) == NULL)
        return PyErr_NoMemory() != NULL;
    for (Py_ssize_t page = 0, at = row->start, token = 0; page < row->pages; page++, at = 0) {
        Py_ssize_t count = width - at < length - token ? width - at : length - token; /* of the row's tokens */
        Py_ssize_t before = begin / width + page; /* the parent's page of the same tokens, where it shares */
        /* All that stands in it is the row's: it is full, and begins where the row does, or with its first slot. */
        if (shares && token + count <= kept && at + count == width &&
            (at == 0 ? before > 0 || parent->start == 0 : before == 0 && at == parent->start)) {
            pages[page] = pages_of(parent)[before];
        }
        else {
            int32_t *slots = tables->slots +
                             (Py_ssize_t)(pages[page] = tables->free_pages[--tables->free_page_count]) * width;
            memset(slots, 0, width * sizeof(int32_t));
            Py_ssize_t old = kept > token ? (kept - token < count ? kept - token : count) : 0;
            tokens_of(tables, parent, parent->length - kept + token, old, slots + at);
            for (Py_ssize_t i = old; i < count; i++)
                slots[at + i] = (int32_t)slot_of(taken, first_own + token + i - kept);
        }
        token += count;
    }
    return 1;
}

/* enter(parents, kept, own, taken, positions) -> (rows, their last slots) */
static PyObject *enter_rows(Tables *tables, PyObject *const *arguments)
{
    Py_ssize_t entries, others[2], made = 0, pages = 0, owned = 0;
    int64_t *parents = rows_of(arguments[0], tables->row_count, &entries);
    int64_t *kept = parents ? rows_of(arguments[1], INT32_MAX, &others[0]) : NULL;
    int64_t *own = kept ? rows_of(arguments[2], INT32_MAX, &others[1]) : NULL;
    Slots taken = {.view = {.obj = NULL}};
    Py_buffer positions = {.obj = NULL};
    PyObject *rows = NULL, *tails = NULL, *result = NULL;
    Row *new = NULL;
    if (own == NULL || !slots_of(arguments[3], &taken, tables->num_slots + 1) ||
        !array_of(arguments[4], &positions, 1, INT64, 0))
        goto done;
    int fits = others[0] == entries && others[1] == entries && positions.shape[0] == taken.count;
    for (Py_ssize_t i = 0; fits && i < entries; i++) {
        fits = kept[i] <= tables->rows[parents[i]].length && kept[i] + own[i] > 0;
        /* Of what is shared, at most the first and the last page are new. */
        pages += (kept[i] > tables->width && own[i] > 0 ? own[i] : kept[i] + own[i]) / tables->width + 3;
        owned += own[i];
    }
    for (Py_ssize_t i = 0; fits && i < taken.count; i++)
        fits = slot_of(&taken, i) > 0 && ((const int64_t *)positions.buf)[i] >= 0 &&
               ((const int64_t *)positions.buf)[i] < INT32_MAX;
    if (!fits || owned != taken.count) {
        PyErr_SetString(PyExc_ValueError, "there must be as many parents, tokens and slots, and no more kept than there are");
        goto done;
    }
    Py_ssize_t before = tables->free_page_count;
    if (!grow_pages(tables, pages) || !grow_rows(tables, entries))
        goto done;
    before = tables->free_page_count;
    new = PyMem_Calloc(entries + 1, sizeof(Row));
    rows = PyList_New(entries);
    tails = PyList_New(entries);
    if (new == NULL)
        PyErr_NoMemory();
    if (new == NULL || rows == NULL || tails == NULL)
        goto done;
    for (Py_ssize_t next = 0; made < entries; next += own[made++]) {
        if (!make_row(tables, new + made, tables->rows + parents[made], kept[made], &taken, next, own[made]))
            break;
        PyObject *tail = PyLong_FromLong(token_of(tables, new + made, new[made].length - 1));
        PyObject *row = PyLong_FromLong(tables->free_rows[tables->free_row_count - 1 - made]);
        PyList_SET_ITEM(tails, made, tail);
        PyList_SET_ITEM(rows, made, row);
        if (tail == NULL || row == NULL) {
            made++;
            break;
        }
    }
    if (!PyErr_Occurred())
        result = PyTuple_Pack(2, rows, tails);
    if (result == NULL) { /* what was taken off the free pages lies there still, in the same order */
        tables->free_page_count = before;
        for (Py_ssize_t i = 0; i < entries; i++)
            if (new[i].pages > 1)
                PyMem_Free(new[i].page.many);
        goto done;
    }
    for (Py_ssize_t i = 0; i < entries; i++) {
        int64_t row = tables->free_rows[--tables->free_row_count];
        tables->rows[row] = new[i];
        count_rows(&tables->counts, tables, &row, 1, 1, NULL);
    }
    for (Py_ssize_t i = 0; i < taken.count; i++)
        tables->written_at[slot_of(&taken, i)] = (int32_t)((const int64_t *)positions.buf)[i];
done:
    PyMem_Free(new);
    PyMem_Free(parents);
    PyMem_Free(kept);
    PyMem_Free(own);
    PyBuffer_Release(&taken.view);
    PyBuffer_Release(&positions);
    Py_XDECREF(rows);
    Py_XDECREF(tails);
    return result;
}

static PyObject *tables_enter(Tables *tables, PyObject *const *arguments, Py_ssize_t count)
{
    PyObject *result = NULL;
    if (!enough(count, 5))
        return NULL;
    Py_BEGIN_CRITICAL_SECTION(tables);
    result = enter_rows(tables, arguments);
    Py_END_CRITICAL_SECTION();
    return result;
}

/* leave(rows) -> (slots that none names any more, whether others of theirs are named still) */
static PyObject *tables_leave_inside(Tables *tables, PyObject *list)
{
    Py_ssize_t number;
    int64_t *rows = taken_rows(tables, list, &number);
    if (rows == NULL)
        return NULL;
    PyObject *result = PyTuple_New(2);
    PyObject *unnamed = result == NULL ? NULL : uncount(&tables->counts, tables, rows, number);
    if (unnamed == NULL) {
        Py_XDECREF(result);
        PyMem_Free(rows);
        return NULL;
    }
    int some_left = 0;
    for (Py_ssize_t i = 0; i < number; i++) {
        const Row *row = tables->rows + rows[i];
        for (int32_t page = 0; page < row->pages; page++) {
            const int32_t *slots = tables->slots + (Py_ssize_t)pages_of(row)[page] * tables->width;
            for (Py_ssize_t slot = 0; !some_left && slot < tables->width; slot++)
                some_left = slots[slot] != 0 && tables->counts.slots[slots[slot]] > 0;
            if (some_left)
                break;
        }
    }
    for (Py_ssize_t i = 0; i < number; i++) {
        const Row *row = tables->rows + rows[i];
        for (int32_t page = 0; page < row->pages; page++) {
            int32_t which = pages_of(row)[page];
            if (tables->counts.pages[which] == 0) {
                tables->free_pages[tables->free_page_count++] = which;
                tables->counts.pages[which] = -1; /* free once, also where several of the rows had it */
            }
        }
    }
    for (Py_ssize_t i = 0; i < number; i++) {
        const Row *row = tables->rows + rows[i];
        for (int32_t page = 0; page < row->pages; page++)
            if (tables->counts.pages[pages_of(row)[page]] < 0)
                tables->counts.pages[pages_of(row)[page]] = 0;
    }
    for (Py_ssize_t i = 0; i < number; i++) {
        free_row(tables, rows[i]);
        tables->free_rows[tables->free_row_count++] = (int32_t)rows[i];
    }
    PyMem_Free(rows);
    PyTuple_SET_ITEM(result, 0, unnamed);
    PyTuple_SET_ITEM(result, 1, PyBool_FromLong(some_left));
    return result;
}

INSIDE_TABLES(leave)

/* The slots [rows, filled] of some rows, each row's newest before column `end`; 0 elsewhere. */
static int64_t *slots_in_columns(const Tables *tables, const int64_t *rows, Py_ssize_t number, Py_ssize_t end,
                                 Py_ssize_t filled)
{
    int64_t *out = PyMem_Calloc(number * filled + 1, sizeof(int64_t));
    if (out == NULL)
        return (int64_t *)PyErr_NoMemory();
    Py_ssize_t width = tables->width;
    for (Py_ssize_t i = 0; i < number; i++) {
        const Row *row = tables->rows + rows[i];
        Py_ssize_t length = row->length < end ? row->length : end, column = end - length;
        Py_ssize_t at = row->start + row->length - length;
        while (column < end && column < filled) {
            const int32_t *slots = tables->slots + (Py_ssize_t)pages_of(row)[at / width] * width;
            Py_ssize_t in_page = at % width, piece = width - in_page;
            for (Py_ssize_t j = 0; j < piece && column < end && column < filled; j++, at++)
                out[i * filled + column++] = slots[in_page + j];
        }
    }
    return out;
}

/* columns(rows, end, columns) -> int64 [rows, columns] */
static PyObject *tables_columns(Tables *tables, PyObject *const *arguments, Py_ssize_t count)
{
    Py_ssize_t numbers[2], number;
    if (!enough(count, 3) || !integers(arguments + 1, 2, numbers))
        return NULL;
    if (numbers[0] < 0 || numbers[1] < 0) {
        PyErr_Format(PyExc_IndexError, "end and columns must be at least 0, got %zd and %zd", numbers[0], numbers[1]);
        return NULL;
    }
    PyObject *result = NULL;
    Py_BEGIN_CRITICAL_SECTION(tables);
    int64_t *rows = rows_of(arguments[0], tables->row_count, &number), *slots = NULL;
    if (rows != NULL && (slots = slots_in_columns(tables, rows, number, numbers[0], numbers[1])) != NULL)
        result = PyByteArray_FromStringAndSize((char *)slots, number * numbers[1] * (Py_ssize_t)sizeof(int64_t));
    PyMem_Free(slots);
    PyMem_Free(rows);
    Py_END_CRITICAL_SECTION();
    return result;
}

/* slots_of(row) -> int64 [tokens] */
static PyObject *tables_slots_of_inside(Tables *tables, PyObject *number)
{
    int64_t row = PyLong_AsLongLong(number);
    if ((row == -1 && PyErr_Occurred()) || !within(row, tables->row_count, "row"))
        return NULL;
    Py_ssize_t length = tables->rows[row].length;
    PyObject *result = PyByteArray_FromStringAndSize(NULL, length * (Py_ssize_t)sizeof(int64_t));
    for (Py_ssize_t i = 0; result != NULL && i < length; i++)
        ((int64_t *)PyByteArray_AS_STRING(result))[i] = token_of(tables, tables->rows + row, i);
    return result;
}

INSIDE_TABLES(slots_of)

/* slots_of_all(rows) -> int64: those of each row, one row after the other */
static PyObject *tables_slots_of_all_inside(Tables *tables, PyObject *list)
{
    Py_ssize_t number, total = 0;
    PyObject *result = NULL;
    int64_t *rows = rows_of(list, tables->row_count, &number);
    for (Py_ssize_t i = 0; rows != NULL && i < number; i++)
        total += tables->rows[rows[i]].length;
    if (rows != NULL)
        result = PyByteArray_FromStringAndSize(NULL, total * (Py_ssize_t)sizeof(int64_t));
    int64_t *next = result == NULL ? NULL : (int64_t *)PyByteArray_AS_STRING(result);
    for (Py_ssize_t i = 0; result != NULL && i < number; i++)
        for (Py_ssize_t token = 0; token < tables->rows[rows[i]].length; token++)
            *next++ = token_of(tables, tables->rows + rows[i], token);
    PyMem_Free(rows);
    return result;
}

INSIDE_TABLES(slots_of_all)

/* pages_of(row) -> [page], each with its slots: for checks */
static PyObject *tables_pages_of_inside(Tables *tables, PyObject *number)
{
    int64_t row = PyLong_AsLongLong(number);
    if ((row == -1 && PyErr_Occurred()) || !within(row, tables->row_count, "row"))
        return NULL;
    PyObject *result = PyList_New(0);
    for (int32_t i = 0; result != NULL && i < tables->rows[row].pages; i++) {
        int32_t page = pages_of(tables->rows + row)[i];
        PyObject *slots = PyList_New(tables->width);
        for (Py_ssize_t j = 0; slots != NULL && j < tables->width; j++) {
            PyObject *slot = PyLong_FromLong(tables->slots[(Py_ssize_t)page * tables->width + j]);
            PyList_SET_ITEM(slots, j, slot);
            if (slot == NULL)
                Py_CLEAR(slots);
        }
        PyObject *pair = slots == NULL ? NULL : Py_BuildValue("(iN)", (int)page, slots);
        if (pair == NULL || PyList_Append(result, pair) < 0)
            Py_CLEAR(result);
        Py_XDECREF(pair);
    }
    return result;
}

INSIDE_TABLES(pages_of)

/* named_elsewhere(rows) -> whether another row names the last slot of these, which all have the same */
static PyObject *tables_named_elsewhere_inside(Tables *tables, PyObject *list)
{
    Py_ssize_t number;
    int64_t *rows = taken_rows(tables, list, &number);
    if (rows == NULL)
        return NULL;
    int32_t named = 0, weight = 0;
    int64_t of_pages = 0;
    for (Py_ssize_t i = 0; i < number; i++) {
        const Row *row = tables->rows + rows[i];
        int32_t page = pages_of(row)[row->pages - 1], before = 0;
        named = token_of(tables, row, row->length - 1);
        for (Py_ssize_t j = 0; j < i; j++) {
            const Row *other = tables->rows + rows[j];
            before |= pages_of(other)[other->pages - 1] == page;
        }
        if (!before) {
            int32_t on_page = tables->counts.pages[page];
            of_pages += on_page;
            weight += on_page < MOST ? on_page : MOST;
        }
    }
    int elsewhere = number && (of_pages > number || tables->counts.slots[named] != weight);
    PyMem_Free(rows);
    return PyBool_FromLong(elsewhere);
}

INSIDE_TABLES(named_elsewhere)

/* positions(slots) -> int32 [slots] that each was written at */
static PyObject *tables_positions_inside(Tables *tables, PyObject *object)
{
    Slots slots;
    if (!slots_of(object, &slots, tables->num_slots + 1))
        return NULL;
    PyObject *result = PyByteArray_FromStringAndSize(NULL, slots.count * (Py_ssize_t)sizeof(int32_t));
    for (Py_ssize_t i = 0; result != NULL && i < slots.count; i++)
        ((int32_t *)PyByteArray_AS_STRING(result))[i] = tables->written_at[slot_of(&slots, i)];
    PyBuffer_Release(&slots.view);
    return result;
}

INSIDE_TABLES(positions)

static PyObject *tables_exclusive_inside(Tables *tables, PyObject *list)
{
    Py_ssize_t number;
    int64_t *rows = taken_rows(tables, list, &number);
    if (rows == NULL)
        return NULL;
    Py_ssize_t exclusive = exclusive_of(&tables->counts, tables, rows, number);
    PyMem_Free(rows);
    return PyLong_FromSsize_t(exclusive);
}

INSIDE_TABLES(exclusive)

static PyObject *tables_weights_inside(Tables *tables, PyObject *slots)
{
    return weights_of(&tables->counts, slots, tables->num_slots + 1);
}

INSIDE_TABLES(weights)

static PyObject *tables_counted_inside(Tables *tables, PyObject *nothing)
{
    return bytes_of_counts(&tables->counts, tables->num_slots);
}

INSIDE_TABLES(counted)

/* Set every count to 0: of the slots in pages that are counted, or of all where that is less. */
static void count_none(Counts *counts, const Tables *tables)
{
    Py_ssize_t used = 0, width = tables->width;
    for (Py_ssize_t page = 0; page < counts->page_count; page++)
        used += counts->pages[page] != 0;
    if (used * width < tables->num_slots)
        for (Py_ssize_t page = 0; page < counts->page_count; page++)
            for (Py_ssize_t i = 0; counts->pages[page] != 0 && i < width; i++)
                counts->slots[tables->slots[page * width + i]] = 0;
    else
        memset(counts->slots, 0, (tables->num_slots + 1) * sizeof(int32_t));
    memset(counts->pages, 0, counts->page_count * sizeof(int32_t));
    counts->used = counts->shared = 0;
}

/* keep(rows): free all others, and count anew */
static PyObject *tables_keep_inside(Tables *tables, PyObject *list)
{
    Py_ssize_t number;
    int64_t *rows = taken_rows(tables, list, &number);
    char *is_kept = rows == NULL ? NULL : PyMem_Calloc(tables->row_count, 1);
    if (is_kept == NULL) {
        PyMem_Free(rows);
        return rows == NULL ? NULL : PyErr_NoMemory();
    }
    for (Py_ssize_t i = 0; i < number; i++)
        is_kept[rows[i]] = 1;
    Counts *counts = &tables->counts;
    count_none(counts, tables);
    tables->free_row_count = tables->free_page_count = 0;
    for (Py_ssize_t row = tables->row_count - 1; row > 0; row--) {
        int64_t one = row;
        if (is_kept[row])
            count_rows(counts, tables, &one, 1, 1, NULL);
        else {
            free_row(tables, row);
            tables->free_rows[tables->free_row_count++] = (int32_t)row;
        }
    }
    for (Py_ssize_t page = tables->page_count - 1; page >= 0; page--)
        if (counts->pages[page] == 0)
            tables->free_pages[tables->free_page_count++] = (int32_t)page;
    PyMem_Free(is_kept);
    PyMem_Free(rows);
    Py_RETURN_NONE;
}

INSIDE_TABLES(keep)

NUMBER_INSIDE(tables, Tables, self, used)
NUMBER_INSIDE(tables, Tables, self, shared)

static PyMethodDef tables_methods[] = {
    METHOD(tables, enter, METH_FASTCALL), METHOD(tables, leave, METH_O),
    METHOD(tables, columns, METH_FASTCALL), METHOD(tables, slots_of, METH_O),
    METHOD(tables, slots_of_all, METH_O),
    METHOD(tables, pages_of, METH_O), METHOD(tables, named_elsewhere, METH_O),
    METHOD(tables, positions, METH_O), METHOD(tables, exclusive, METH_O),
    METHOD(tables, weights, METH_O), METHOD(tables, counted, METH_NOARGS),
    METHOD(tables, keep, METH_O), {NULL, NULL, 0, NULL},
};

static PyGetSetDef tables_fields[] = {
    {"used", (getter)tables_used, NULL, NULL, NULL},
    {"shared", (getter)tables_shared, NULL, NULL, NULL},
    {NULL, NULL, NULL, NULL, NULL},
};

static PyType_Slot tables_slots[] = {
    {Py_tp_new, tables_new}, {Py_tp_dealloc, tables_dealloc}, {Py_tp_methods, tables_methods},
    {Py_tp_getset, tables_fields}, {0, NULL},
};

static PyType_Spec tables_spec = {
    "concurrent_kv._native.Tables", sizeof(Tables), 0, Py_TPFLAGS_DEFAULT, tables_slots,
};

/* Uses: of some of the rows ------------------------------------------------------------------------------------------ */

static PyObject *uses_new(PyTypeObject *type, PyObject *arguments, PyObject *keywords)
{
    static char *names[] = {"tables", NULL};
    PyObject *tables;
    if (!PyArg_ParseTupleAndKeywords(arguments, keywords, "O!", names, tables_type, &tables))
        return NULL;
    Uses *uses = (Uses *)type->tp_alloc(type, 0);
    if (uses == NULL)
        return NULL;
    uses->tables = (Tables *)Py_NewRef(tables);
    if (!new_counts(&uses->counts, uses->tables->num_slots)) {
        Py_DECREF(uses);
        return NULL;
    }
    return (PyObject *)uses;
}

static void uses_dealloc(Uses *uses)
{
    PyTypeObject *type = Py_TYPE(uses);
    Py_XDECREF(uses->tables);
    free_counts(&uses->counts);
    type->tp_free(uses);
    Py_DECREF(type);
}

/* Rows that it has counted, as far as that can be seen; or, to be counted in, rows of the tables. */
static int64_t *rows_in_use(Uses *uses, PyObject *list, int counted, Py_ssize_t *number)
{
    int64_t *rows = taken_rows(uses->tables, list, number);
    if (rows == NULL)
        return NULL;
    if (!grow_counts(&uses->counts, uses->tables->page_count)) {
        PyMem_Free(rows);
        return NULL;
    }
    for (Py_ssize_t i = 0; counted && i < *number; i++) {
        const Row *row = uses->tables->rows + rows[i];
        for (int32_t page = 0; page < row->pages; page++)
            if (uses->counts.pages[pages_of(row)[page]] == 0) {
                PyErr_Format(PyExc_ValueError, "row %lld was not counted in", (long long)rows[i]);
                PyMem_Free(rows);
                return NULL;
            }
    }
    return rows;
}

static PyObject *uses_add_inside(Uses *uses, PyObject *list)
{
    Py_ssize_t number;
    int64_t *rows = rows_in_use(uses, list, 0, &number);
    if (rows == NULL)
        return NULL;
    count_rows(&uses->counts, uses->tables, rows, number, 1, NULL);
    PyMem_Free(rows);
    Py_RETURN_NONE;
}

INSIDE_USES(add)

static PyObject *uses_remove_inside(Uses *uses, PyObject *list)
{
    Py_ssize_t number;
    int64_t *rows = rows_in_use(uses, list, 1, &number);
    if (rows == NULL)
        return NULL;
    count_rows(&uses->counts, uses->tables, rows, number, -1, NULL);
    PyMem_Free(rows);
    Py_RETURN_NONE;
}

INSIDE_USES(remove)

static PyObject *uses_exclusive_inside(Uses *uses, PyObject *list)
{
    Py_ssize_t number;
    int64_t *rows = rows_in_use(uses, list, 1, &number);
    if (rows == NULL)
        return NULL;
    Py_ssize_t exclusive = exclusive_of(&uses->counts, uses->tables, rows, number);
    PyMem_Free(rows);
    return PyLong_FromSsize_t(exclusive);
}

INSIDE_USES(exclusive)

static PyObject *uses_weights_inside(Uses *uses, PyObject *slots)
{
    return weights_of(&uses->counts, slots, uses->tables->num_slots + 1);
}

INSIDE_USES(weights)

static PyObject *uses_counted_inside(Uses *uses, PyObject *nothing)
{
    return bytes_of_counts(&uses->counts, uses->tables->num_slots);
}

INSIDE_USES(counted)

/* keep(rows): count these, and no others */
static PyObject *uses_keep_inside(Uses *uses, PyObject *list)
{
    Py_ssize_t number;
    int64_t *rows = rows_in_use(uses, list, 0, &number);
    if (rows == NULL)
        return NULL;
    memset(uses->counts.pages, 0, uses->counts.page_count * sizeof(int32_t));
    memset(uses->counts.slots, 0, (uses->tables->num_slots + 1) * sizeof(int32_t));
    uses->counts.used = uses->counts.shared = 0;
    count_rows(&uses->counts, uses->tables, rows, number, 1, NULL);
    PyMem_Free(rows);
    Py_RETURN_NONE;
}

INSIDE_USES(keep)

NUMBER_INSIDE(uses, Uses, self->tables, used)

static PyMethodDef uses_methods[] = {
    METHOD(uses, add, METH_O), METHOD(uses, remove, METH_O), METHOD(uses, exclusive, METH_O),
    METHOD(uses, weights, METH_O), METHOD(uses, counted, METH_NOARGS), METHOD(uses, keep, METH_O),
    {NULL, NULL, 0, NULL},
};

static PyGetSetDef uses_fields[] = {
    {"used", (getter)uses_used, NULL, NULL, NULL}, {NULL, NULL, NULL, NULL, NULL},
};

static PyType_Slot uses_slots[] = {
    {Py_tp_new, uses_new}, {Py_tp_dealloc, uses_dealloc}, {Py_tp_methods, uses_methods}, {Py_tp_getset, uses_fields},
    {0, NULL},
};

static PyType_Spec uses_spec = {
    "concurrent_kv._native.Uses", sizeof(Uses), 0, Py_TPFLAGS_DEFAULT, uses_slots,
};

/* The slots first to last as a range that joins `runs`. */
static int add_run(PyObject *runs, int64_t first, int64_t last)
{
    PyObject *run = PyObject_CallFunction((PyObject *)&PyRange_Type, "LL", (long long)first, (long long)last + 1);
    int added = run != NULL && PyList_Append(runs, run) == 0;
    Py_XDECREF(run);
    return added;
}

/* Sorted slots as ranges, no more than `most`, or else as they are. */
static PyObject *runs_of(const int64_t *sorted, Py_ssize_t count, Py_ssize_t most)
{
    Py_ssize_t pieces = count > 0;
    for (Py_ssize_t i = 1; i < count; i++)
        pieces += sorted[i] != sorted[i - 1] + 1;
    if (pieces > most)
        return PyByteArray_FromStringAndSize((const char *)sorted, count * (Py_ssize_t)sizeof(int64_t));
    PyObject *runs = PyList_New(0);
    for (Py_ssize_t i = 0, first = 0; runs != NULL && i < count; i++)
        if (i + 1 == count || sorted[i + 1] != sorted[i] + 1) {
            if (!add_run(runs, sorted[first], sorted[i]))
                Py_CLEAR(runs);
            first = i + 1;
        }
    return runs;
}

/* in_runs(slots, most) -> the slots, which are different, in ascending order: as ranges, no more than `most`, or else as
 * int64; None where they lie so far apart that it takes long.
 */
static PyObject *in_runs(PyObject *module, PyObject *const *arguments, Py_ssize_t count)
{
    Py_ssize_t most;
    Slots slots;
    if (!enough(count, 2) || !integers(arguments + 1, 1, &most) || !slots_of(arguments[0], &slots, INT32_MAX))
        return NULL;
    int64_t least = INT64_MAX, greatest = -1;
    for (Py_ssize_t i = 0; i < slots.count; i++) {
        int64_t number = slot_of(&slots, i);
        least = number < least ? number : least;
        greatest = number > greatest ? number : greatest;
    }
    Py_ssize_t words = slots.count ? (Py_ssize_t)((greatest - least) / 64 + 1) : 0, found = 0;
    PyObject *result = NULL;
    if (words > 8 * slots.count + 64)
        result = Py_NewRef(Py_None);
    else {
        uint64_t *bits = PyMem_Calloc(words + 1, sizeof(uint64_t));
        int64_t *sorted = PyMem_Malloc((slots.count + 1) * sizeof(int64_t));
        for (Py_ssize_t i = 0; bits != NULL && i < slots.count; i++)
            bits[(slot_of(&slots, i) - least) / 64] |= (uint64_t)1 << (slot_of(&slots, i) - least) % 64;
        for (Py_ssize_t word = 0; bits != NULL && sorted != NULL && word < words; word++)
            for (int bit = 0; bits[word] != 0 && bit < 64; bit++)
                if (bits[word] >> bit & 1)
                    sorted[found++] = least + word * 64 + bit;
        result = bits == NULL || sorted == NULL ? PyErr_NoMemory() : runs_of(sorted, found, most);
        PyMem_Free(bits);
        PyMem_Free(sorted);
    }
    PyBuffer_Release(&slots.view);
    return result;
}

#endif
