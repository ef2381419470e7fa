/*
 * Runs before the sample's init on the small kernel with CONFIG_PAGE_OWNER, without a C library: says on the console
 * what /sys/kernel/debug/page_owner says, frees pages of its own, and becomes the sample's init.
 */
#include <asm/unistd.h>

#define PAGE_SIZE 4096
#define RECORDS 2000
#define FREED 64
#define PFN_MASK ((1UL << 55) - 1)
#define O_RDONLY 0
#define PROT_READ_WRITE 3
#define MAP_PRIVATE_ANONYMOUS 0x22

static long syscall6(long number, long a, long b, long c, long d, long e, long f)
{
	long result;
	register long r10 __asm__("r10") = d;
	register long r8 __asm__("r8") = e;
	register long r9 __asm__("r9") = f;

	__asm__ volatile("syscall"
			 : "=a"(result)
			 : "a"(number), "D"(a), "S"(b), "d"(c), "r"(r10), "r"(r8), "r"(r9)
			 : "rcx", "r11", "memory");
	return result;
}

#define syscall(number, a, b, c) syscall6(number, (long)(a), (long)(b), (long)(c), 0, 0, 0)

static unsigned long length(const char *text)
{
	unsigned long n = 0;

	while (text[n])
		n++;
	return n;
}

static void say(const char *text)
{
	syscall(__NR_write, 1, text, length(text));
}

static void say_number(unsigned long value)
{
	char text[24];
	char *at = text + sizeof(text) - 1;

	*at = 0;
	do
		*--at = '0' + value % 10;
	while (value /= 10);
	say(at);
}

static long check(long result, const char *what)
{
	if (result >= 0)
		return result;
	say("KSTUB-GUEST-FAILED ");
	say(what);
	say("\n");
	for (;;)
		syscall(__NR_pause, 0, 0, 0);
}

static void mount(const char *type, const char *place)
{
	syscall(__NR_mkdir, place, 0755, 0);
	check(syscall6(__NR_mount, (long)type, (long)place, (long)type, 0, 0, 0), type);
}

/* The number after `PFN `, which every record has; 0 if it is cut off. Before v6.8 or so it is decimal. */
static unsigned long frame_of(const char *record, long size)
{
	unsigned long frame = 0, base = 10;
	long at = 4;

	while (at < size && !(record[at - 4] == 'P' && record[at - 3] == 'F' && record[at - 2] == 'N'))
		at++;
	for (; at < size && record[at] != ' '; at++)
		if (record[at] == 'x')
			base = 16;
		else
			frame = frame * base + record[at] - (record[at] <= '9' ? '0' : 'a' - 10);
	return frame;
}

/* The offset in the file is a frame number: what is read is the record of the first allocated page from there on. */
static void say_records(void)
{
	static char record[PAGE_SIZE];
	long file = check(syscall(__NR_open, "/debug/page_owner", O_RDONLY, 0), "page_owner");
	unsigned long at = 0;

	for (unsigned int i = 0; i < RECORDS; i++) {
		long size = syscall6(__NR_pread64, file, (long)record, sizeof(record), at, 0, 0);
		unsigned long frame = frame_of(record, size);

		if (!frame)
			break;
		say("KSTUB-OWNER\n");
		syscall(__NR_write, 1, record, size);
		say("KSTUB-END\n");
		at = frame + 1;
	}
	syscall(__NR_close, file, 0, 0);
}

/* Touches pages, says which frames they are, and gives them back. */
static void free_pages(void)
{
	static unsigned long entries[FREED];
	long size = FREED * PAGE_SIZE;
	char *pages = (char *)check(syscall6(__NR_mmap, 0, size, PROT_READ_WRITE, MAP_PRIVATE_ANONYMOUS, -1, 0), "mmap");
	long file = check(syscall(__NR_open, "/proc/self/pagemap", O_RDONLY, 0), "pagemap");

	for (unsigned int i = 0; i < FREED; i++)
		((volatile char *)pages)[i * PAGE_SIZE] = 1;
	check(syscall6(__NR_pread64, file, (long)entries, sizeof(entries), (long)pages / PAGE_SIZE * 8, 0, 0), "pagemap");
	syscall(__NR_close, file, 0, 0);
	for (unsigned int i = 0; i < FREED; i++) {
		say("KSTUB-FREED ");
		say_number(entries[i] & PFN_MASK);
		say("\n");
	}
	check(syscall(__NR_munmap, pages, size, 0), "munmap");
}

_Noreturn void _start(void)
{
	static const char *const arguments[] = { "/init", 0 };

	mount("proc", "/proc");
	mount("debugfs", "/debug");
	say_records();
	free_pages();
	check(syscall(__NR_execve, "/sample", arguments, arguments + 1), "execve");
	__builtin_unreachable();
}
